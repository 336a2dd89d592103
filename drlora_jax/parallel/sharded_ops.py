"""Runs the operations of `ops` over a mesh, in `shard_map`: each device computes its rows and its
experts.

Expert parallelism is dropless: the tokens of an expert group are gathered, or each device is sent
the tokens that it needs (`parallel.exchange`); every device runs its own experts on them, and the
partial sums are returned. Over `tensor` a device has some of the attention heads, some of the
experts (for the rows of the whole group) and a part of the vocabulary. The rest of the model needs
no communication beyond what the partition rules imply.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from drlora_jax.ops import Ops, ops_for
from drlora_jax.ops.attention.api import Backend
from drlora_jax.ops.experts.backends import Experts
from drlora_jax.ops.experts.shared import Dropout
from drlora_jax.ops.lora_deltas import side_by_side
from drlora_jax.parallel.exchange import GATHER, choose_exchange, exchange, plan_dispatch
from drlora_jax.parallel.mesh import (
    EXPERTS,
    ROWS,
    fitting_spec,
    platform_of,
    shards_of,
    spec_for,
)


def sharded_ops(
    mesh: Mesh,
    *,
    attention: Backend = "auto",
    experts: Experts = "auto",
    exchange: str = "auto",
    dtype=jnp.float32,
) -> Ops:
    """Returns the operations for programs over a mesh; unsharded ones if it has one device.

    Args:
      dtype: Dtype of activations.
      exchange: How tokens reach their experts: gather, ragged, padded, or auto (by sizes).
    """
    ops = ops_for(
        platform_of(mesh),
        expert_shards=shards_of(mesh, EXPERTS),
        attention=attention,
        experts=experts,
        dtype=dtype,
    )
    if mesh.size == 1:
        return ops
    return Ops(
        partial(_expert_mlp, mesh, ops.expert_mlp, exchange),
        partial(_attend, mesh, ops.attend),
        partial(_summed_nll, mesh, ops.summed_nll),
        partial(_embed, mesh),
        side_by_side,
    )


def _shard_map(function, mesh, in_specs, out_specs):
    # The replication check does not support our custom gradients.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _expert_mlp(
    mesh,
    run_local,
    wanted,
    x_TD,
    expert_TK,
    weight_TK,
    w_gate_up_EDF,
    w_down_EFD,
    lora,
    spec,
    *,
    dropout=None,
):
    kind = choose_exchange(wanted, platform_of(mesh), mesh.shape["expert"], expert_TK.shape[1])
    communicate = _gathered if kind == GATHER else partial(_exchanged, kind)
    has_dropout = dropout is not None
    key = dropout.key if has_dropout else jax.random.key(0)

    def local(x_TD, expert_TK, weight_TK, w_gate_up_EDF, w_down_EFD, lora, key):
        tokens, choices = expert_TK.shape
        first_token = jax.lax.axis_index(ROWS) * tokens
        first_slot_T = (first_token + jnp.arange(tokens)) * choices

        def run(x_TD, expert_TK, weight_TK, first_slot_T):
            # Indices outside [0, local experts) belong to other devices.
            local_TK = expert_TK - jax.lax.axis_index(EXPERTS) * w_gate_up_EDF.shape[0]
            weights = (weight_TK, w_gate_up_EDF, w_down_EFD)
            own = Dropout(key, first_slot_T) if has_dropout else None
            return run_local(x_TD, local_TK, *weights, lora, spec, dropout=own)

        experts_per_peer = w_gate_up_EDF.shape[0] * mesh.shape["tensor"]
        y_TD = communicate(run, experts_per_peer, x_TD, expert_TK, weight_TK, first_slot_T)
        return jax.lax.psum(y_TD, "tensor")

    rows, experts = P(ROWS), P(EXPERTS)
    sharded = _shard_map(local, mesh, (rows, rows, rows, experts, experts, experts, P()), rows)
    return sharded(x_TD, expert_TK, weight_TK, w_gate_up_EDF, w_down_EFD, lora, key)


def _gathered(run, _, *tokens):
    """Gathers all tokens of an expert group on each of its devices, and scatters partial sums."""

    def gather(array):
        return jax.lax.all_gather(array, "expert", axis=0, tiled=True)

    y_TD = run(*map(gather, tokens))
    return jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True)


def _exchanged(kind, run, experts_per_peer, x_TD, expert_TK, weight_TK, first_slot_T):
    """Sends every device the tokens that chose one of its experts, and their sums back."""
    tokens, peers = x_TD.shape[0], jax.lax.axis_size("expert")
    token_S, traffic = plan_dispatch(expert_TK, experts_per_peer, "expert")

    def send(array, fill=0):
        rows_S = array.at[token_S].get(mode="fill", fill_value=fill)
        return exchange(kind, "expert", peers * tokens, rows_S, traffic)

    # Unused rows of the receive buffer are zero, and 0 is an expert: indices are sent plus one.
    numbers_QN = send(jnp.concatenate([expert_TK + 1, first_slot_T[:, None]], axis=1))
    y_QD = run(send(x_TD), numbers_QN[:, :-1] - 1, send(weight_TK), numbers_QN[:, -1])
    y_SD = exchange(kind, "expert", token_S.shape[0], y_QD, traffic.back())
    return jnp.zeros_like(x_TD).at[token_S].add(y_SD, mode="drop")


def _attend(
    mesh,
    run_local,
    q_BTNH,
    k_BSGH,
    v_BSGV,
    *,
    segment_ids_BT,
    positions_BT,
    sinks_N=None,
    **options,
):
    tensor, groups = mesh.shape["tensor"], k_BSGH.shape[2]
    splits_groups = groups % tensor == 0

    def local(q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT, sinks_N):
        if not splits_groups:  # several devices share a key-value head: each selects its own
            own = jax.lax.axis_index("tensor") * groups // tensor
            k_BSGH, v_BSGV = (
                jax.lax.dynamic_slice_in_dim(whole, own, 1, axis=2) for whole in (k_BSGH, v_BSGV)
            )
        return run_local(
            q_BTNH,
            k_BSGH,
            v_BSGV,
            segment_ids_BT=segment_ids_BT,
            positions_BT=positions_BT,
            sinks_N=sinks_N,
            **options,
        )

    rows, split = P(ROWS), P(ROWS, None, "tensor")
    keys = split if splits_groups else rows
    run = _shard_map(local, mesh, (split, keys, keys, rows, rows, P("tensor")), split)
    return run(q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT, sinks_N)


def _summed_nll(mesh, run_local, hidden_TD, head_DV, targets_T, mask_T, **options):
    is_split = mesh.shape["tensor"] > 1 and head_DV.shape[1] % mesh.shape["tensor"] == 0
    if is_split and not options.get("head_grad"):
        options |= {"vocab_axis": "tensor"}

    def local(hidden_TD, head_DV, targets_T, mask_T):
        return run_local(hidden_TD, head_DV, targets_T, mask_T, **options)[None]

    rows, head = P(ROWS), P(None, options.get("vocab_axis"))
    # One partial sum per shard: the transpose of a sum inside would sum a second time.
    return jnp.sum(
        _shard_map(local, mesh, (rows, head, rows, rows), rows)(
            hidden_TD, head_DV, targets_T, mask_T
        )
    )


def _embed(mesh, table_VD, tokens_BT):
    """Looks up rows of a sharded table: token ids are sent to the rows, and vectors sent back."""
    spec = fitting_spec(mesh, spec_for("params/embedding"), table_VD.shape)

    def local(table_VD, tokens_BT):
        is_wide = spec[1] is None or mesh.shape["fsdp"] == 1
        if not is_wide:
            tokens_BT = jax.lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True)
        own_BT = tokens_BT
        if spec[0] is not None:  # ids outside [0, local rows) belong to other devices: zero here
            own_BT = tokens_BT - jax.lax.axis_index("tensor") * table_VD.shape[0]
            own_BT = jnp.where(own_BT < 0, table_VD.shape[0], own_BT)
        x_BTD = table_VD.at[own_BT].get(mode="fill", fill_value=0)
        if spec[0] is not None:
            x_BTD = jax.lax.psum(x_BTD, "tensor")
        if not is_wide:
            x_BTD = jax.lax.all_to_all(x_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return x_BTD

    return _shard_map(local, mesh, (spec, P(ROWS)), P(ROWS))(table_VD, tokens_BT)
