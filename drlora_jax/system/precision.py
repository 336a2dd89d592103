"""Which number format a model computes in.

`model.dtype` is that of the base's weights and of activations. Whatever it is, routers, softmax,
norms, the loss, factors, gradients of factors and the optimizer's moments are float32.
"""

import jax


def resolve_dtype(name: str) -> str:
    """`auto` is bfloat16 on accelerators, and float32 on CPUs, which have no fast bfloat16."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
