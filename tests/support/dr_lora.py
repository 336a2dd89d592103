"""DR-LoRA at a small size: a policy, measurements of steps, and its saliency by the definition."""

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.allocation import CapacityShapes, StepStats
from drlora_jax.allocation.growth import Stats
from tests.support import policies

SHAPES = CapacityShapes(layers=2, projections=3, experts=5, max_rank=6)
DEFAULTS = {
    "total_steps": 100,
    "r_init": 2,
    "r_target": 4,
    "interval": 10,
    "p_grow": 0.5,
    "gamma": 1.2,
    "frequency_decay": 0.9,
    "importance_decay": 0.8,
    "warmup_ratio": 0.1,
}


def make_policy(shapes=SHAPES, kind="dr_lora", **options):
    defaults = {n: v for n, v in DEFAULTS.items() if kind == "dr_lora" or n != "gamma"}
    return policies.make_policy(kind, shapes, **(defaults | options))


def make_steps(steps=4, micro_batches=3, seed=0):
    """Measurements of some steps; expert 0 never gets tokens, the others now and then."""
    rng = np.random.default_rng(seed)
    size_MLE = (micro_batches, SHAPES.layers, SHAPES.experts)
    for _ in range(steps):
        count_MLE = rng.integers(0, 3, size_MLE) * rng.integers(0, 2, size_MLE)
        count_MLE[..., 0] = 0
        yield {
            "gate_grad": rng.normal(size=(micro_batches, *SHAPES)),
            "elementwise": rng.random(SHAPES),
            "count": count_MLE.astype(float),
            "weight": count_MLE * rng.random(size_MLE),
            "tokens": rng.integers(1, 9, micro_batches).astype(float),
        }


def run_accumulate(policy, steps):
    stats, accumulate = policy.init_stats(), jax.jit(policy.accumulate)
    for step in steps:
        stats = accumulate(stats, measured(step))
    return stats


def measured(step):
    """What the step of such measurements shows a policy."""
    names = ("gate_grad", "count", "weight", "tokens")
    arrays = (jnp.asarray(step[name], jnp.float32) for name in names)
    return StepStats(*arrays, {"elementwise": jnp.asarray(step["elementwise"], jnp.float32)})


def make_stats(seed=0, ranks_LE=None, scale=1.0, updates=None):
    """Random statistics; inactive ranks have importance 0."""
    rng = np.random.default_rng(seed)
    ranks_LE = np.full(SHAPES[::2], 2) if ranks_LE is None else ranks_LE
    mask_LER = np.arange(SHAPES.max_rank) < ranks_LE[..., None]
    importance_LPER = scale * rng.random(SHAPES) * mask_LER[:, None]
    updates_LE = np.full(ranks_LE.shape, 3.0) if updates is None else updates
    arrays = (rng.random(ranks_LE.shape), importance_LPER, updates_LE)
    return Stats(*(value.astype(np.float32) for value in arrays))


RANKS_LE = np.array([[2, 3, 2, 4, 2], [0, 2, 6, 3, 1]], np.int32)


def stated_saliency(stats, ranks_LE, *, gamma, decay, floor=0.0):
    """f g / (r + 1) ** gamma, one layer and one expert at a time."""
    stats = [np.asarray(value, np.float64) for value in stats]
    result = np.zeros(ranks_LE.shape)
    for layer, ranks_E in enumerate(ranks_LE):
        g = np.zeros(len(ranks_E))
        for expert, rank in enumerate(ranks_E):
            if rank:
                g[expert] = stats[1][layer, :, expert, :rank].mean()
            if decay is not None:
                updates = stats[2][layer, expert]
                g[expert] = g[expert] / (1 - decay**updates) if updates else 0
        f, g = (value / max(value.sum(), floor or 1e-300) for value in (stats[0][layer], g))
        result[layer] = (f + floor) * (g + floor) / (ranks_E + 1) ** gamma
    return result
