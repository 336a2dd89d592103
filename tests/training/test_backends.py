"""What runs where: the choice by platform, and reading compiled programs for what must not be."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from drlora_jax.ops import ops_for
from drlora_jax.parallel.mesh import make_mesh, platform_of
from drlora_jax.system.compilation import keep_compiled_programs
from drlora_jax.training import costs, program
from drlora_jax.training.job import prepare
from drlora_jax.training.step import compile_step
from tests.support.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]


def load(name: str):
    """A module of benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_experts_by_platform():
    assert platform_of(make_mesh((1, 1, 1, 1))) == "cpu"
    assert ops_for("cpu").expert_mlp.keywords["backend"] == "native"
    assert ops_for("cpu", dtype=jnp.bfloat16).expert_mlp.keywords["backend"] == "block"
    assert ops_for("cpu") == ops_for("cpu")  # one program, not two
    assert ops_for("tpu").expert_mlp.keywords["backend"] == "ragged"
    assert ops_for("gpu").expert_mlp.keywords["backend"] == "dense"


def test_compiled_programs_are_kept_on_accelerators(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert keep_compiled_programs("cpu") is None
        assert keep_compiled_programs("gpu") == str(tmp_path / "drlora_jax" / "xla")
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")  # the user's
        assert keep_compiled_programs("tpu") == "/elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def expansions():
    return load("expansions")


def text_of(function, *inputs) -> str:
    return jax.jit(function).lower(*inputs).compile().as_text()


def test_the_dense_expansion_is_found():
    """On CPU `lax.ragged_dot` is one, in every direction, and a plain product is none."""
    rows, weights, dy = jnp.ones((384, 128)), jnp.ones((5, 128, 256)), jnp.ones((384, 256))
    size_E, sizes = jnp.full(5, 70, jnp.int32), dict(experts=5, rows=384, widths=(128, 256))

    def gradient(of, rows, weights):
        _, pull = jax.vjp(lambda *inputs: jax.lax.ragged_dot(*inputs, size_E), rows, weights)
        return pull(dy)[of]

    directions = [lambda *inputs: jax.lax.ragged_dot(*inputs, size_E)]
    directions += [functools.partial(gradient, of) for of in (0, 1)]
    for direction in directions:
        assert expansions().dense_expansions(text_of(direction, rows, weights), **sizes)
    plain = text_of(jnp.matmul, rows, weights[0])
    assert not expansions().dense_expansions(plain, **sizes)


def test_what_only_looks_like_an_expansion():
    """Arrays of as many numbers, a stack of weights, and weights of as many columns as rows."""
    sizes = dict(experts=8, rows=4096, widths=(4096, 14336))
    find = functools.partial(expansions().dense_expansions, **sizes)
    assert find("bf16[4096,8,4096] f32[8,4096,1,14336] f32[32768,4096] bf16[4096,114688]")
    assert not find("bf16[16,2048,4096] f32[2,4,4096,4096] bf16[32,8,4096,14336] s8[8,4096]")
    found = find("bf16[8,4096,14336] bf16[8,4096,4096]", own=((8, 14336, 4096),))
    assert found == ["bf16[8,4096,4096]"]


def test_a_step_that_became_dense_is_named(tmp_path, monkeypatch):
    """On CPU `lax.ragged_dot` multiplies every row with every expert."""
    monkeypatch.setattr(costs.backends, "cannot", lambda backend, call: None)
    for experts in ("ragged", "block"):
        config = tiny_config(tmp_path)
        model = dataclasses.replace(config.model, experts=experts)
        run = program.build(prepare(dataclasses.replace(config, model=model)), jax.devices()[:1])
        compiled, _ = compile_step(run)
        found = expansions().step_expansions(run, compiled.as_text())
        assert bool(found) == (experts == "ragged")


MODULE = """\
HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%fused (p: bf16[4,8]) -> bf16[32,8] {
  %all-gather.1 = bf16[32,8]{1,0} all-gather(%p), dimensions={0}, metadata={op_name="a/b"}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[32,8] fusion(%x), kind=kCustom, calls=%fused
  %r = (f32[8]{0}, f32[4,2]{1,0}) all-reduce(%a, %b), to_apply=%sum, metadata={op_name="c"}
}

%known (p: (s32[])) -> (s32[]) {
  %s = (bf16[4,8], bf16[32,8]) all-gather-start(%p), dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %while.2 = (s32[]) while(%u), condition=%c, body=%known, backend_config={"known_trip_count":{"n":"3"}}
  %p = u32[] collective-permute(%k), source_target_pairs={{0,1}}
  %send.1 = (f32[17,8]{1,0}, u32[]{:S(2)}, token[]) send(%g, %token), channel_id=4, is_host_transfer=true
  %done = token[] send-done(%send.1), channel_id=4, is_host_transfer=true
}
"""  # noqa: E501


def test_collectives_of_a_module():
    hlo = load("hlo_text")
    found = [(each.kind, each.shape, each.times, each.bytes) for each in hlo.collectives(MODULE)]
    assert found == [
        ("all-gather", "bf16[32,8]", 32, 512),
        ("all-reduce", "f32[8] f32[4,2]", 32, 64),
        ("all-gather", "bf16[32,8]", 3, 512),
        ("collective-permute", "u32[]", 1, 4),
        ("send", "f32[17,8]", 1, 544),
    ]


def test_what_may_travel():
    hlo = load("hlo_text")
    # Width 16, hidden 24, 4 of 8 experts a shard, fsdp 2, vocabulary 100, rank 2, three layers.
    matrices = ((16, 48), (8, 48), (24, 16), (12, 16))
    limits = hlo.Limits(4, matrices, 100, 1600, {(8, 2, 16), (3, 8, 2, 16)})

    def reason(shape):
        return hlo.forbidden(hlo.Collective("all-gather", shape, 1, ""), limits)

    allowed = ("bf16[1,4,16,48]", "bf16[4,24,16]", "bf16[4096,16]", "bf16[16,100]", "f32[4,2,16]")
    assert not any(reason(shape) for shape in allowed)
    assert "experts of one shard" in reason("bf16[8,16,48]")
    assert "experts of one shard" in reason("s32[1] bf16[2,4,24,16]")
    assert "experts of one shard" in reason("bf16[8,8,48]")  # over the expert axis only
    assert reason("f32[64,100]") == "logits"
    assert reason("f32[1,8,2,16]") == "LoRA matrices of all experts"
    assert reason("f32[3,8,2,16]") == "LoRA matrices of all experts"


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)


def compile_for_tpu(folder, *arguments):
    """The report and the program of a small step with growth state."""
    (folder / "config.json").write_text(
        '{"model_type": "olmoe", "vocab_size": 640, "hidden_size": 256, "intermediate_size": 384,'
        '"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,'
        '"num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": false}'
    )
    command = [sys.executable, "benchmarks/aot_tpu.py", "--topology", "v5e:2x2"]
    command += ["--config", "configs/olmoe.py", "--model", str(folder), "--text"]
    command += [str(folder / "hlo"), "train.batch_size=16", "train.micro_batches=2"]
    command += ["train.sequence_length=256", *arguments]
    # libtpu otherwise lets one process at a time use it, even to compile.
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of 16 GiB of a chip" in done.stdout
    return done.stdout, (folder / "hlo").read_text()


@needs_libtpu
@pytest.mark.parametrize("experts", ["auto", "tokamax"])
def test_a_small_step_compiles_for_tpu(tmp_path, experts):
    """Expert-parallel and FSDP, with the real grouped product and attention."""
    if experts == "tokamax" and importlib.util.find_spec("tokamax") is None:
        pytest.skip("tokamax is not installed: it needs Python 3.12 or newer")
    mesh = ["mesh.data=1", "mesh.fsdp=2", "mesh.expert=2"]
    report, text = compile_for_tpu(tmp_path, *mesh, f"model.experts={experts}")
    assert "all-gather" in report and "reduce-scatter" in report
    assert "ragged_dot_tiling" in text  # factors: tokamax leaves thin products to it
    assert ("tpu_ragged_dot_gmm" in text) == (experts == "tokamax")
    assert "tpu_ragged_dot_tgmm" not in text  # a frozen base has no gradient


@needs_libtpu
@pytest.mark.parametrize(
    "arguments, travels",
    [
        (["mesh.data=1", "mesh.expert=4", "mesh.exchange=ragged"], "ragged-all-to-all"),
        (["mesh.data=1", "mesh.expert=2", "mesh.tensor=2"], "reduce-scatter"),
        (["mesh.data=2", "mesh.expert=2", "mesh.fsdp=2", "--slices", "2"], "all-reduce"),
    ],
    ids=["ragged", "tensor", "slices"],
)
def test_every_mesh_compiles_for_tpu(tmp_path, arguments, travels):
    report, _ = compile_for_tpu(tmp_path, *arguments)
    assert travels in report
