"""What `model.dtype` decides, and what stays float32 whatever it says."""

import jax
import jax.numpy as jnp
import pytest

from drlora_jax.models import layers, moe
from drlora_jax.system.precision import resolve_dtype
from drlora_jax.training.job import prepare
from tests.support.stepper import Stepper
from tests.support.tiny import tiny_config


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_auto_depends_on_the_device(monkeypatch, tmp_path, backend, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert resolve_dtype("auto") == dtype
    assert resolve_dtype("float32") == "float32"
    assert prepare(tiny_config(tmp_path)).config.model.dtype == dtype  # what config.json gets


def test_in_bfloat16_what_is_learned_and_decided_is_float32(monkeypatch, tmp_path):
    seen = {"router": set(), "norm": set()}
    choose, rsqrt = moe.choose_experts, jax.lax.rsqrt
    monkeypatch.setattr(
        moe,
        "choose_experts",
        lambda logits, *rest: (seen["router"].add(logits.dtype), choose(logits, *rest))[1],
    )
    monkeypatch.setattr(layers.jax.lax, "rsqrt", lambda x: (seen["norm"].add(x.dtype), rsqrt(x))[1])
    stepper = Stepper(tmp_path, model=dict(dtype="bfloat16"))
    metrics = stepper.step()
    float32, bfloat16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
    assert seen == {"router": {float32}, "norm": {float32}}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == float32
    state = stepper.position.state
    floats = [
        leaf
        for leaf in jax.tree.leaves((state.lora, state.opt_state, state.mask_LER, state.stats))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert floats and {leaf.dtype for leaf in floats} == {float32}
    assert {leaf.dtype for leaf in jax.tree.leaves(stepper.run.abstract_params)} == {bfloat16}
