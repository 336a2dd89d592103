"""Defines one optimizer step as pure functions: loss, gradients, importance of every rank, masked
update, statistics.

    step = jax.jit(make_train_step(model, tx, policy, StepOptions()))  # built and compiled once
    state, metrics = step(params, state, batch)  # params are frozen; the mask is in the state

The rank mask is multiplied by a gate of ones, and the gradient with respect to that gate is the
importance of every rank: it falls out of the same backward pass. A growth event only replaces the
values of `state.mask_LER`, so the step compiles once. The loss is the summed NLL / the number of
target tokens over the whole batch, in nats, however the batch is split into micro-batches and over
devices. Letters: M micro-batches, B rows, T positions; L, P, E, R as in `allocation.base`.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from drlora_jax.adapters.rank_trees import gates_tree, lora_like, masks_tree, over_roles
from drlora_jax.allocation.base import Policy, StepStats
from drlora_jax.allocation.measurements import StepView
from drlora_jax.data.loader import Batch
from drlora_jax.models.routing import RoutingStats
from drlora_jax.models.transformer import (
    Decoder,
    head_weights,
    init_variables,
)


class TrainState(NamedTuple):
    """Holds everything that a step changes. `params` are separate: frozen, not saved."""

    step: jax.Array  # i32, optimizer steps done
    lora: Any
    opt_state: Any
    mask_LER: jax.Array  # f32, derived from the ranks on the host
    stats: Any  # statistics of the policy


class LossTerms(NamedTuple):
    nll: jax.Array  # summed over target tokens
    auxiliary: jax.Array  # balance and z loss, weighted


class AuxiliaryWeights(NamedTuple):
    balance: float = 0.0
    z: float = 0.0
    # pooled over all layers, averaged per_layer, or switch; see `auxiliary_loss`.
    balance_form: str = "pooled"


def init_lora(model: Decoder, key: jax.Array) -> dict:
    """Returns the `lora` collection before step 1: random A, zero B, zero router deltas."""
    return init_variables(model, key).get("lora", {})


# ------------------------------------------------------------------------------------------- loss


def batch_loss(
    model: Decoder,
    variables: dict,
    batch: Batch,
    weights: AuxiliaryWeights,
    *,
    key=None,
    head_grad=False,
):
    """Returns (summed NLL, auxiliary loss per token) and the routing statistics of one micro-batch
    [B, T].

    Args:
      variables: `params`, and for an adapted model `lora` and `rank_mask`.
      key: Key of dropout; None disables it (evaluation).
      head_grad: Whether embedding and head are trained (pretraining).
    """
    rngs = None if key is None else {"dropout": key}
    hidden_BTD, stats = model.apply(
        variables, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, rngs=rngs
    )
    config = model.config
    nll = model.options.ops.summed_nll(
        hidden_BTD.reshape(-1, config.width),
        head_weights(config, variables["params"]),
        batch.targets_BT.reshape(-1),
        batch.target_mask_BT.reshape(-1),
        soft_cap=config.logit_soft_cap,
        head_grad=head_grad,
    )
    tokens = jnp.maximum(jnp.sum(batch.segment_ids_BT > 0), 1).astype(jnp.float32)
    return LossTerms(nll, auxiliary_loss(stats, tokens, weights)), stats


def auxiliary_loss(
    stats: RoutingStats | None, tokens: jax.Array, weights: AuxiliaryWeights
) -> jax.Array:
    """Returns the load-balance and z loss of one micro-batch.

    balance = E * sum_e (C_e / n) (P_e / n), where C_e counts how often expert e is chosen by the n
    valid tokens and P_e sums their softmax probabilities. `pooled` averages both over all MoE
    layers first, as transformers does, so one layer's idle expert can hide behind another layer's
    busy one. `per_layer` averages the layers' own losses. Perfect balance gives the number of
    experts per token. `switch` is per layer and counts first choices only (perfect balance: 1). E
    is the number of available experts of the layer; where every matrix has a router (MoLA), C_e and
    P_e of a layer are means over its matrices. z = mean logsumexp(logits) ** 2.
    """
    if stats is None or not (weights.balance or weights.z):
        return jnp.zeros(())
    choices_LE = stats.first_E if weights.balance_form == "switch" else stats.count_E
    chosen_LE = jax.lax.stop_gradient(choices_LE) / tokens
    probable_LE = stats.probability_E / tokens
    if weights.balance_form == "pooled":
        chosen_LE, probable_LE = (
            jnp.mean(x, axis=0, keepdims=True) for x in (chosen_LE, probable_LE)
        )
    balance = jnp.mean(stats.experts * jnp.sum(chosen_LE * probable_LE, axis=1))
    return weights.balance * balance + weights.z * jnp.mean(stats.log_z_squared) / tokens


# -------------------------------------------------------------------------------------- optimizer


class Hold(NamedTuple):
    """Holds pytrees of booleans, structured like `lora`: which weights train, and which rows may
    move.
    """

    trains: Any  # False: parameter and moments are unchanged
    active: Any  # False: the update is exactly zero


def held_update(tx: optax.GradientTransformation, grads, opt_state, lora, hold: Hold):
    """Applies `tx.update` and `apply_updates` without changing held weights or their moments.
    Returns (lora, opt_state).
    """
    # What does not train must not enter the clipped norm either.
    grads = jax.tree.map(lambda grad, trains: jnp.where(trains, grad, 0), grads, hold.trains)
    updates, new_state = tx.update(grads, opt_state, lora)
    keep = optax.tree.map_params(
        tx,
        lambda _, trains: trains,
        new_state,
        hold.trains,
        transform_non_params=lambda _: jnp.asarray(True),
    )
    opt_state = jax.tree.map(jnp.where, keep, new_state, opt_state)
    updates = jax.tree.map(
        lambda update, trains, active: jnp.where(trains & active, update, 0),
        updates,
        hold.trains,
        hold.active,
    )
    return optax.apply_updates(lora, updates), opt_state


# ------------------------------------------------------------------------------------------ steps


class StepOptions(NamedTuple):
    auxiliary: AuxiliaryWeights = AuxiliaryWeights()
    freeze_idle_experts: bool = True
    freeze_a: bool = False
    router_start: int = 0  # steps before a trained router starts to change
    seed: int = 0  # seed of dropout


def make_train_step(
    model: Decoder, tx: optax.GradientTransformation, policy: Policy, options: StepOptions
) -> Callable:
    """Returns a pure `step(params, state, batch [M, B, T]) -> (state, metrics)` for fine-tuning."""
    gradients = _make_gradients(model, policy, options)

    def step(params, state: TrainState, batch: Batch):
        tokens_M = jnp.sum(batch.segment_ids_BT > 0, axis=(1, 2)).astype(jnp.float32)
        targets = jnp.maximum(jnp.sum(batch.target_mask_BT), 1.0)
        key = jax.random.fold_in(jax.random.key(options.seed), state.step)

        def accumulate(total, inputs):
            index, micro, share = inputs
            micro_key = jax.random.fold_in(key, index)
            (grads, gate_grad), (terms, stats) = gradients(
                params, state, micro_key, micro, share, targets
            )
            return jax.tree.map(jnp.add, total, grads), (gate_grad, terms, stats)

        zeros = jax.tree.map(jnp.zeros_like, state.lora)
        shares_M = tokens_M / jnp.maximum(jnp.sum(tokens_M), 1.0)
        inputs = (jnp.arange(tokens_M.size), batch, shares_M)
        grads, (gate_grad_MLPER, terms_M, stats_ML) = jax.lax.scan(accumulate, zeros, inputs)

        measured, stats = None, state.stats
        if stats_ML is not None:
            measured = _measured(model, policy, state, grads, gate_grad_MLPER, stats_ML, tokens_M)
            stats = policy.accumulate(state.stats, measured)
        hold = _hold(model, options, state, measured)
        if any(each.opens for each in policy.measures):
            grads = _without_opened(grads, hold)
        lora, opt_state = held_update(tx, grads, state.opt_state, state.lora, hold)
        metrics = {
            "loss": jnp.sum(terms_M.nll) / targets,
            "auxiliary_loss": jnp.sum(terms_M.auxiliary * shares_M),
            "grad_norm": optax.tree.norm(grads),
        } | _routing_metrics(measured)
        return TrainState(state.step + 1, lora, opt_state, state.mask_LER, stats), metrics

    return step


def _make_gradients(model: Decoder, policy: Policy, options: StepOptions) -> Callable:
    """Returns `gradients(params, state, key, batch, share, targets)`, which differentiates one
    micro-batch's part of the loss with respect to LoRA matrices and gates, and returns what it
    measured.
    """
    adapter = model.options.adapter
    projections = len(adapter.expert_roles())

    def gradients(params, state: TrainState, key, batch: Batch, share, targets):
        def loss_fn(lora, gate_LPER):
            mask_LER = state.mask_LER
            for each in policy.measures:
                if each.opens:
                    mask_LER = each.opens(mask_LER, not adapter.makes_experts)
            masked_LPER = gate_LPER * mask_LER[:, None]
            variables = {
                "params": params,
                "lora": lora,
                "rank_mask": gates_tree(model, masked_LPER),
            }
            terms, stats = batch_loss(model, variables, batch, options.auxiliary, key=key)
            return terms.nll / targets + share * terms.auxiliary, (terms, stats)

        layers, experts, ranks = state.mask_LER.shape
        ones_LPER = jnp.ones((layers, projections, experts, ranks), jnp.float32)
        (_, measured), grads = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(
            state.lora, ones_LPER
        )
        return grads, measured

    return gradients


def _measured(
    model: Decoder,
    policy: Policy,
    state: TrainState,
    grads,
    gate_grad_MLPER: jax.Array,
    stats_ML: RoutingStats,
    tokens_M: jax.Array,
) -> StepStats:
    """Returns the measurements of a step that the policy receives."""
    adapter = model.options.adapter

    def each_role(measure):
        def of_role(layer, role):
            matrices, gradients = layer(state.lora, role), layer(grads, role)
            return measure(matrices, gradients, adapter.gated_side(role))

        return over_roles(model, of_role)

    view = StepView(state.lora, grads, state.mask_LER, each_role, not adapter.makes_experts)
    return StepStats(
        gate_grad_MLPER,
        stats_ML.count_E,
        stats_ML.weight_E,
        tokens_M,
        {each.name: each.measure(view) for each in policy.measures},
    )


def _without_opened(grads, hold: Hold):
    """Returns the gradients without those of ranks that were activated only to be measured."""
    return jax.tree.map(lambda grad, is_on: jnp.where(is_on, grad, 0), grads, hold.active)


def _hold(
    model: Decoder, options: StepOptions, state: TrainState, measured: StepStats | None
) -> Hold:
    """Returns what this step's update may change."""
    is_used_LE = jnp.ones(state.mask_LER.shape[:2], bool)
    if measured is not None and options.freeze_idle_experts:
        is_used_LE = jnp.sum(measured.count_MLE, axis=0) > 0
    moves_router = state.step >= options.router_start
    every_rank = jnp.ones_like(state.mask_LER)
    trains = lora_like(model, state.lora, is_used_LE, every_rank, moves_router)
    if options.freeze_a:
        trains = jax.tree.map_with_path(lambda path, leaf: leaf & (path[-1].key != "a"), trains)
    every_expert = jnp.ones_like(is_used_LE)
    active = lora_like(model, state.lora, every_expert, state.mask_LER, moves_router)
    return Hold(trains, active)


def _routing_metrics(measured: StepStats | None) -> dict[str, jax.Array | None]:
    """Returns the combine weight per token and the share of routing choices of every expert; None
    without experts.
    """
    if measured is None:
        return {"weight_LE": None, "load_LE": None}
    count_LE = jnp.sum(measured.count_MLE, axis=0)
    weight_LE = jnp.sum(measured.weight_MLE, axis=0) / jnp.sum(measured.tokens_M)
    choices_L1 = jnp.sum(count_LE, axis=1, keepdims=True)
    return {"weight_LE": weight_LE, "load_LE": count_LE / jnp.maximum(choices_L1, 1.0)}


def make_eval_step(model: Decoder) -> Callable:
    """Returns a pure `step(params, lora, mask_LER, batch [B, T])` that returns summed NLL, number
    of target tokens and routing statistics.
    """

    def step(params, lora, mask_LER, batch: Batch):
        gates = masks_tree(model, mask_LER)
        variables = {"params": params, "lora": lora, "rank_mask": gates}
        terms, stats = batch_loss(model, variables, batch, AuxiliaryWeights())
        return terms.nll, jnp.sum(batch.target_mask_BT), stats

    return step


def make_pretrain_step(
    model: Decoder, tx: optax.GradientTransformation, auxiliary: AuxiliaryWeights
) -> Callable:
    """Returns a pure `step(params, opt_state, batch [M, B, T]) -> (params, opt_state, metrics)`
    that trains all of `params`.
    """

    def step(params, opt_state, batch: Batch):
        targets = jnp.maximum(jnp.sum(batch.target_mask_BT), 1.0)
        micro_batches = batch.tokens_BT.shape[0]

        def accumulate(total, micro):
            def loss_fn(params):
                terms, _ = batch_loss(model, {"params": params}, micro, auxiliary, head_grad=True)
                return terms.nll / targets + terms.auxiliary / micro_batches, terms

            (_, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            return jax.tree.map(jnp.add, total, grads), terms

        grads, terms_M = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {
            "loss": jnp.sum(terms_M.nll) / targets,
            "auxiliary_loss": jnp.mean(terms_M.auxiliary),
            "grad_norm": optax.tree.norm(grads),
        }
        return optax.apply_updates(params, updates), opt_state, metrics

    return step


def compile_step(run) -> tuple[Callable, float]:
    """Compiles the train step of a `program.Run` ahead of time; returns it, and the seconds that
    it took.
    """
    start = time.perf_counter()
    inputs = run.abstract_params, run.abstract_state, run.abstract_batch
    return run.step.lower(*inputs).compile(), time.perf_counter() - start
