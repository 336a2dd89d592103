"""The number format that a model computes in.

`model.dtype` is the dtype of the base model's weights and of activations. Routers, softmax, norms,
the loss, LoRA matrices, their gradients and the optimizer's moments are always float32.
"""

import jax


def resolve_dtype(name: str) -> str:
    """Resolves `auto` to bfloat16 on accelerators and float32 on CPUs, which have no fast
    bfloat16.
    """
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
