"""Defines what a step can measure for a policy, and the measures of a rank's importance.

Gate gradients and routing are measured in every step (`StepStats`). Anything else is a
`Measurement` that a policy declares; the step evaluates `Policy.measures` without knowing any of
them by name.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from drlora_jax.allocation.base import StepStats


class StepView(NamedTuple):
    """Gives a measurement access to a step, after its gradients are computed."""

    lora: Any
    grads: Any  # same structure as `lora`, summed over micro-batches and devices
    mask_LER: jax.Array  # f32, the active ranks
    # each_role(measure) -> f32 [L, P, E, R] calls measure(matrices, gradients, side) -> [..., E, R]
    # for every role of a layer. Matrices and gradients are {"a": [..., E, R, D], "b": [..., E, R,
    # D]}, with E = 1 where the experts share a matrix; `side` is the one that starts at zero and is
    # never shared.
    each_role: Callable[[Callable[[dict, dict, str], jax.Array]], jax.Array]
    # An expert without ranks still computes, since it is one of the base model's.
    has_base_experts: bool


class Measurement(NamedTuple):
    """Defines a quantity that a step measures for a policy that declares it."""

    name: str
    measure: Callable[[StepView], jax.Array]  # f32 [L, P, E, R]
    # (mask_LER, has_base_experts) -> the mask that the loss is computed with; None: the active
    # ranks. Ranks that it activates in addition are measured but not trained.
    opens: Callable[[jax.Array, bool], jax.Array] | None = None


def _elementwise(view: StepView) -> jax.Array:
    """Returns (sum_j |A_kj dA_kj|) * (sum_i |B_ik dB_ik|) for every rank."""

    def sides(matrices: dict, gradients: dict, _) -> jax.Array:
        a_side, b_side = (
            jnp.sum(jnp.abs(matrices[side] * gradients[side]), axis=-1) for side in ("a", "b")
        )
        return a_side * b_side

    return view.each_role(sides)


def _with_next_rank(mask_LER: jax.Array, has_base_experts: bool) -> jax.Array:
    """Returns the mask in which every expert's next inactive rank is active too.

    The row of that rank is zero in the matrix that starts at zero, so the output of the model is
    unchanged, but the row has a gradient. An expert of the adapter that has no rank stays inactive.
    """
    first_LE1 = mask_LER[..., :1]
    if has_base_experts:
        first_LE1 = jnp.ones_like(first_LE1)
    return jnp.concatenate([first_LE1, mask_LER[..., :-1]], axis=-1)


def _next_rank(view: StepView) -> jax.Array:
    """Returns sum_i dB_ik^2 for the rank k that `_with_next_rank` activates, 0 for all others; with
    A in place of B where A is the matrix that starts at zero.
    """
    rows_LPER = view.each_role(
        lambda matrices, gradients, side: jnp.sum(gradients[side] ** 2, axis=-1)
    )
    opened_LER = _with_next_rank(view.mask_LER, view.has_base_experts) - view.mask_LER
    return rows_LPER * opened_LER[:, None]


ELEMENTWISE = Measurement("elementwise", _elementwise)
PROBE = Measurement("probe", _next_rank, opens=_with_next_rank)


# ------------------------------------------------------------------------------------- importance


class Importance(NamedTuple):
    """Measures how much every rank matters to the loss of one step."""

    of: Callable[[StepStats], jax.Array]  # f32 [L, P, E, R]; runs inside the jitted step
    measures: tuple[Measurement, ...] = ()
    # It scores the next inactive rank of every expert, not the active ones.
    is_of_next_rank: bool = False


def _gate_abs(step: StepStats) -> jax.Array:
    """Returns |d loss / d gate|. The absolute value is taken once, after the sum over micro-batches
    and devices, because the gate gradient is linear.
    """
    return jnp.abs(jnp.sum(step.gate_grad_MLPER, axis=0))


IMPORTANCES = {
    "gate_abs": Importance(_gate_abs),
    "gate_sq": Importance(lambda step: _gate_abs(step) ** 2),
    "elementwise_product": Importance(
        lambda step: step.measured[ELEMENTWISE.name], measures=(ELEMENTWISE,)
    ),
    "probe": Importance(
        lambda step: step.measured[PROBE.name], measures=(PROBE,), is_of_next_rank=True
    ),
}
ImportanceName = Literal["gate_abs", "gate_sq", "elementwise_product", "probe"]
