"""The compiled kernels of the CPU: how they are built and kept, and what they do at their edges.

That they compute what the other backends compute is in test_experts.py and test_attention.py.
"""

import functools
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.ops.experts.api import expert_mlp
from drlora_jax.ops.experts.shared import Dropout
from drlora_jax.ops.native import library
from tests.support.attention import SEGMENTS
from tests.support.attention import make_inputs as attention_inputs
from tests.support.attention import run as attend
from tests.support.expert_mlps import (
    SPEC,
    choose,
    groups,
    make_inputs,
    random_like,
    reference,
    relative_error,
    value_and_pull,
)

ROOT = pathlib.Path(__file__).parents[2]


def python(code: str, **environment) -> subprocess.CompletedProcess:
    """A process of its own, which finds or builds the kernels anew."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------------------------------- building

WHY_NOT = "from drlora_jax.ops.native import library; print(library.why_not())"
# A compiler that makes each source once for all tests here: they are about what is kept where.
COMPILER = """#!{python}
import pathlib, shutil, subprocess, sys
arguments = sys.argv[1:]
if "-c" not in arguments:
    raise SystemExit(subprocess.call(["c++", *arguments]))
made = pathlib.Path(arguments[-1])
kept = pathlib.Path(__file__).with_name(made.name)
if not kept.exists():
    subprocess.run(["c++", "-O0", *arguments[:-1], str(kept)], check=True)
shutil.copy(kept, made)
"""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(COMPILER.format(python=sys.executable))
    script.chmod(0o700)
    return {"CXX": str(script)}


CHOICES = """
import jax.numpy as jnp
from drlora_jax.ops.attention import api as attention
from drlora_jax.ops.experts import backends
float32 = jnp.dtype(jnp.float32)
experts = backends.Call("cpu", float32)
of_attention = attention.choose_backend("cpu", attention.Call(512, 64, 64, float32))
print(backends.choose_backend(experts), of_attention)
print(backends.cannot("native", experts))
"""


def kept_in(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.so")}


def test_built_once_and_kept(tmp_path, compiler):
    """The second process finds what the first has built; other options are another library."""
    home = {"XDG_CACHE_HOME": str(tmp_path), **compiler}
    assert python(WHY_NOT, **home).stdout == "None\n"
    first = kept_in(tmp_path)
    assert len(first) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".so"]
    assert python(WHY_NOT, **home).stdout == "None\n"
    assert kept_in(tmp_path) == first
    assert python(WHY_NOT, **home, DRLORA_CXXFLAGS="-DX").stdout == "None\n"
    assert len(kept_in(tmp_path)) == 2
    # One that is damaged is built again.
    for path in files:
        path.write_bytes(b"")
    assert python(WHY_NOT, **home).stdout == "None\n"
    assert files[0].stat().st_size > 0


def test_a_compiler_that_fails(tmp_path):
    """Its first words are passed on."""
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no space" >&2; exit 1; }\n')
    broken.chmod(0o700)
    said = python(WHY_NOT, XDG_CACHE_HOME=str(tmp_path), CXX=str(broken)).stdout
    assert said == "they cannot be built or loaded: no space\n"
    assert not kept_in(tmp_path)


@pytest.mark.parametrize("home", ["a file", "missing", "of everybody"])
def test_a_cache_that_is_not_ones_own(tmp_path, home, compiler):
    """The kernels are built for this process alone, and what others could write is not loaded."""
    place = tmp_path / "cache"
    if home == "a file":
        place.write_text("")
    elif home == "of everybody":
        folder = place / "drlora_jax" / "native"
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    else:
        place = "/proc/nowhere"
    result = python(WHY_NOT, XDG_CACHE_HOME=str(place), **compiler)
    assert result.stdout == "None\n", result.stderr
    assert not kept_in(tmp_path)


def test_without_a_compiler(tmp_path):
    """XLA's operations do the work, and a run that asks for the kernels is told why not."""
    result = python(CHOICES, XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler")
    assert result.stdout.splitlines() == [
        "block chunked",
        "no C++ compiler was found (CXX=no-such-compiler)",
    ], result.stderr


SAME_NUMBERS = """
from tests.support.native import check_numbers
check_numbers()
print("same")
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of that family")
@pytest.mark.parametrize("machine", ["x86-64", "haswell"])
def test_other_processors(tmp_path, machine):
    """Vectors of 4 and of 8; this machine's own are used in the other tests."""
    flags = {"DRLORA_CXXFLAGS": f"-O1 -march={machine}", "XDG_CACHE_HOME": str(tmp_path)}
    result = python(SAME_NUMBERS, **flags)
    assert result.stdout == "same\n", result.stderr[-2000:]


# --------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16])
def test_any_number_of_parts(monkeypatch, parts):
    """Also more than there are slots, and experts that several parts share."""
    monkeypatch.setattr(library, "parts", lambda: parts)
    cases = (groups(0, 50, 0, 7), groups(90), groups(1, 1, 1), choose(40, 4, 6))
    for expert_TK in cases:
        inputs = make_inputs(expert_TK, int(expert_TK.max()) + 1, ("gate_up", "down"))
        dy = random_like(inputs[0])
        y, (dx, dp, *_, d_lora) = reference(inputs, np.asarray(dy, np.float64), "silu")
        # Not the compiled function of another number of parts.
        run = jax.jit(functools.partial(value_and_pull.__wrapped__, spec=SPEC, backend="native"))
        got_y, (got_dx, got_dp, *_, got_lora) = run(inputs, dy)
        for got, expected in zip(
            jax.tree.leaves((got_y, got_dx, got_dp, got_lora)),
            jax.tree.leaves((y, dx, dp, d_lora)),
            strict=True,
        ):
            assert relative_error(got, expected) <= 1e-5


def test_weights_of_another_dtype_go_to_the_block_walk():
    x_TD, expert_TK, weight_TK, *weights, lora = make_inputs(choose(20, 2, 3), 3)
    weights = [array.astype(jnp.bfloat16) for array in weights]
    inputs = (x_TD, expert_TK, weight_TK, *weights, lora)
    np.testing.assert_array_equal(
        expert_mlp(*inputs, SPEC), expert_mlp(*inputs, SPEC, backend="block")
    )
    with pytest.raises(ValueError, match="in float32, not in bfloat16"):
        expert_mlp(*inputs, SPEC, backend="native")


def test_results_do_not_depend_on_which_thread_was_faster():
    inputs = make_inputs(choose(300, 4, 9), 9, width=40, hidden=24)
    dy = random_like(inputs[0])
    first = value_and_pull(inputs, dy, SPEC, "native")
    for _ in range(20):
        again = value_and_pull(inputs, dy, SPEC, "native")
        jax.tree.map(np.testing.assert_array_equal, first, again)


def test_many_rows_of_wide_experts():
    """More rows than are worked on together, products deeper and wider than a packed panel."""
    inputs = make_inputs(groups(1100, 3), 2, ("gate_up", "down"), width=1100, hidden=530, ranks=20)
    dy, dropout = random_like(inputs[0]), Dropout(jax.random.key(1))
    for spec in (SPEC, SPEC._replace(dropout=0.2)):
        dense, native = (
            value_and_pull(inputs, dy, spec, name, dropout) for name in ("dense", "native")
        )
        for got, expected in zip(jax.tree.leaves(native), jax.tree.leaves(dense), strict=True):
            assert relative_error(got, expected) <= 1e-5


# ---------------------------------------------------------------------------------------- numbers


def test_what_is_no_number_stays_none():
    """A loss that is no number has to be seen, not to become one."""
    inputs = list(make_inputs(choose(40, 2, 3), 3))
    inputs[0] = inputs[0].at[5, 2].set(jnp.nan)
    y_TD, (dx_TD, *_) = value_and_pull(tuple(inputs), random_like(inputs[0]), SPEC, "native")
    for array in (np.asarray(y_TD), np.asarray(dx_TD)):
        assert np.isnan(array[5]).all() and np.isfinite(np.delete(array, 5, axis=0)).all()
    q, k, v = attention_inputs()
    out = np.array(attend(q.at[1, 3, 0, 1].set(jnp.nan), k, v, backend="native"))
    assert np.isnan(out[1, 3, 0]).all()
    out[1, 3, 0] = 0
    assert np.isfinite(out[SEGMENTS > 0]).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_over_their_whole_range(activation):
    """One token a value, through a model that is the activation: gate x, up and down one."""
    values = np.concatenate([-np.geomspace(1e-6, 300, 400), [0], np.geomspace(1e-6, 300, 400)])
    x_TD = jnp.asarray(np.stack([values, np.ones_like(values)], axis=1), jnp.float32)
    gate_up = jnp.asarray([[[1.0, 0.0], [0.0, 1.0]]])
    down = jnp.asarray([[[1.0, 0.0]]])
    one = (jnp.zeros((len(values), 1), jnp.int32), jnp.ones((len(values), 1)))
    spec = SPEC._replace(activation=activation)
    got = expert_mlp(x_TD, *one, gate_up, down, {}, spec, backend="native")[:, 0]
    exact = np.asarray(x_TD[:, 0], np.float64)
    if activation == "silu":
        exact = exact / (1 + np.exp(-exact))
    else:
        inner = np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)
        exact = 0.5 * exact * (1 + np.tanh(inner))
    np.testing.assert_allclose(got, exact, rtol=2e-6, atol=3e-7)
