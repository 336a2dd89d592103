"""What a step can measure for a policy, and the ways to say how much a rank matters.

Gate gradients and routing are measured in every step (`StepStats`). Anything else is a
`Measurement` that a policy declares; the step takes the values of `Policy.measures` and knows none
of them by name.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from drlora_jax.allocation.base import StepStats

if TYPE_CHECKING:
    import jax


class StepView(NamedTuple):
    """What a measurement sees of a step, after its gradients."""

    lora: Any
    grads: Any  # like `lora`, summed over micro-batches and devices
    mask_LER: "jax.Array"  # f32, the active ranks
    # each_role(measure) -> f32 [L, P, E, R] of measure(matrices, gradients, side) -> [..., E, R],
    # the first two {"a": [..., E, R, D], "b": [..., E, R, D]} of one role of a layer (E is 1 where
    # the experts share one), and the side that starts at zero and is never shared
    each_role: Callable[[Callable[[dict, dict, str], "jax.Array"]], "jax.Array"]
    # an expert without a rank still computes: it is one of the base model's
    has_base_experts: bool


class Measurement(NamedTuple):
    """Something that a step measures because a policy asks for it."""

    name: str
    measure: Callable[[StepView], "jax.Array"]  # f32 [L, P, E, R]
    # (mask_LER, has_base_experts) -> the mask that the loss is computed with; None: the active
    # ranks. What it opens is measured and not trained.
    opens: Callable[["jax.Array", bool], "jax.Array"] | None = None


def _elementwise(view: StepView) -> "jax.Array":
    """(sum_j |A_kj dA_kj|) * (sum_i |B_ik dB_ik|) for every rank."""
    import jax.numpy as jnp

    def sides(matrices: dict, gradients: dict, _) -> "jax.Array":
        a_side, b_side = (
            jnp.sum(jnp.abs(matrices[side] * gradients[side]), axis=-1) for side in ("a", "b")
        )
        return a_side * b_side

    return view.each_role(sides)


def _with_next_rank(mask_LER: "jax.Array", has_base_experts: bool) -> "jax.Array":
    """Opens every expert's next inactive rank. Its row of the matrix that starts at zero is zero,
    so the model computes the same; that row has a gradient. An adapter's own expert without a rank
    stays inactive.
    """
    import jax.numpy as jnp

    first_LE1 = mask_LER[..., :1]
    if has_base_experts:
        first_LE1 = jnp.ones_like(first_LE1)
    return jnp.concatenate([first_LE1, mask_LER[..., :-1]], axis=-1)


def _next_rank(view: StepView) -> "jax.Array":
    """sum_i dB_ik^2 for the rank k that `_with_next_rank` opened, 0 for all others; with A in the
    place of B where it is A that starts at zero.
    """
    import jax.numpy as jnp

    rows_LPER = view.each_role(
        lambda matrices, gradients, side: jnp.sum(gradients[side] ** 2, axis=-1)
    )
    opened_LER = _with_next_rank(view.mask_LER, view.has_base_experts) - view.mask_LER
    return rows_LPER * opened_LER[:, None]


ELEMENTWISE = Measurement("elementwise", _elementwise)
PROBE = Measurement("probe", _next_rank, opens=_with_next_rank)


# ------------------------------------------------------------------------------------- importance


class Importance(NamedTuple):
    """How much every rank matters to the loss of one step."""

    of: Callable[[StepStats], "jax.Array"]  # f32 [L, P, E, R]; jnp, in the step
    measures: tuple[Measurement, ...] = ()
    is_of_next_rank: bool = False  # of one inactive rank of an expert, not of its active ones


def _gate_abs(step: StepStats) -> "jax.Array":
    """|d loss / d gate|: the sign is dropped once, after the sum over micro-batches and devices,
    because the gate gradient is linear.
    """
    import jax.numpy as jnp

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
