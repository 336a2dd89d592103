"""Steps compiled for a GPU that is not there, and reading what was compiled."""

import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from drlora_jax.errors import RunError, UserError

ROOT = pathlib.Path(__file__).parents[1]
has_plugin = importlib.util.find_spec("jax_cuda13_plugin") is not None


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/ by its name; the environment is left as it is."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return importlib.import_module


def compile_step(*arguments: str):
    command = [sys.executable, "benchmarks/aot_gpu.py", *arguments]
    # Without the tests' flags for simulated devices.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not has_plugin, reason="needs pip install 'drlora-jax[cuda-aot]'")
def test_the_bundled_step_compiles_for_an_h200(tmp_path):
    done = compile_step("--config", "bundled:tiny", "model.dtype=bfloat16")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "kernels     experts=mosaic attention=cudnn (gpu)" in done.stdout
    assert "for 1 x NVIDIA H200 with jax" in done.stdout and "expansions  none" in done.stdout
    assert "mosaic_gpu" in done.stdout and "not counted in FLOPs: none" in done.stdout
    assert "T bf16" in done.stdout


@pytest.mark.skipif(has_plugin, reason="the plugin is there")
def test_without_the_plugin_it_says_what_to_install(benchmark, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as attention

    monkeypatch.setattr(attention, "check_cudnn_version", attention.check_cudnn_version)
    gpu = benchmark("gpu_targets").GPUS["h200"]
    install = r"pip install 'drlora-jax\[cuda-aot\]' jax-cuda13-plugin=="
    with pytest.raises(UserError, match=f"jax cannot compile for an NVIDIA GPU here.*{install}"):
        benchmark("aot_gpu").described_devices(gpu, 1)


def test_a_compiler_that_crashes_or_hangs(benchmark):
    run_apart = benchmark("aot_gpu").run_apart
    with pytest.raises(RunError, match="ended with SIGABRT"):
        run_apart([sys.executable, "-c", "import os; os.abort()"], 1)
    with pytest.raises(RunError, match="after 0.01 minutes"):
        run_apart([sys.executable, "-c", "import time; time.sleep(60)"], 0.01)
    assert run_apart([sys.executable, "-c", "raise SystemExit(2)"], 1) == 2


def test_what_is_refused(benchmark):
    check, gpus = benchmark("aot_gpu").check, benchmark("gpu_targets").GPUS
    check([], 100.0, gpus["h200"])
    with pytest.raises(RunError, match=r"bf16\[8,96,64\] is a dense expansion"):
        check(["bf16[8,96,64]"], 10.0, gpus["h200"])
    with pytest.raises(RunError, match="100.0 GiB do not fit 79 GiB"):
        check([], 100.0, gpus["h100"])


def test_a_described_gpu(benchmark):
    """Text that XLA reads: every bracket is closed, and the numbers are of that GPU."""
    targets = benchmark("gpu_targets")
    for name, gpu in targets.GPUS.items():
        text = targets.target_config(gpu)
        assert text.count("{") == text.count("}") and name[1:] in text
        assert f"device_memory_size: {gpu.memory} memory_bandwidth: {gpu.bandwidth}" in text


CALL = (
    'custom-call({operands}), custom_call_target="{target}", '
    "operand_layout_constraints={{{layouts}}}, api_version=API, "
    "backend_config={{{config}}}"
)


def call(target: str, layouts: str, config: str = "", operands: str = "%a, %b, %c") -> str:
    return CALL.format(operands=operands, target=target, layouts=layouts, config=config)


ATTENTION = '"intermediate_tensor_shape": {"dimensions": ["2", "3", "16", "16"]}, "mask_type": '
MODULE = f"""\
HloModule step

%fused (p.1: bf16[8,4]) -> f32[8,16] {{
  %p.1 = bf16[8,4]{{1,0}} parameter(0)
  %p.2 = bf16[4,16]{{1,0}} parameter(1)
  %c.1 = f32[8,4]{{1,0}} convert(%p.1)
  %c.2 = f32[4,16]{{1,0}} convert(%p.2)
  %t.2 = f32[4,16]{{1,0}} bitcast(%c.2)
  ROOT %dot.1 = f32[8,16]{{1,0}} dot(%c.1, %t.2), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%body (s: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {{
  %s = (s32[], /*index=1*/bf16[8,4]{{1,0}}) parameter(0)
  %x = bf16[8,4]{{1,0}} get-tuple-element(%s), index=1
  %f = f32[8,16]{{1,0}} fusion(%x, %x), kind=kCustom, calls=%fused
  %g = bf16[96,16]{{1,0}} {call("mosaic_gpu_v2", "s32[5]{0}, bf16[96,8]{1,0}, bf16[5,8,16]{2,1,0}")}
  %w = bf16[5,8,16]{{2,1,0}} {call("mosaic_gpu_v2", "s32[5]{0}, bf16[96,8]{1,0}, bf16[96,16]{1,0}")}
}}

%cond (s: (s32[], bf16[8,4])) -> pred[] {{
  ROOT %lt = pred[] compare(%s, %s), direction=LT
}}

%open (s: (s32[])) -> (s32[]) {{
  %p.5 = f32[8,4]{{1,0}} parameter(0)
  %d = f32[8,8]{{1,0}} dot(%p.5, %p.5), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
}}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {{
  %x.0 = bf16[8,4]{{1,0}} parameter(0)
  %w.1 = (s32[], bf16[8,4]{{1,0}}) while(%t), condition=%cond, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %w.2 = (s32[]) while(%u), condition=%cond, body=%open
  %a = (bf16[2,3,16,4]{{3,2,1,0}}, u8[0]{{0}}) {call("__cudnn$fmhaSoftmax", "bf16[2,16,3,4]{3,2,1,0}", ATTENTION + '"CAUSAL"')}
  %b = (bf16[2,3,16,4]{{3,2,1,0}}, u8[0]{{0}}) {call("__cudnn$fmhaSoftmaxBackward", "bf16[2,16,3,4]{3,2,1,0}", ATTENTION + '"NO_MASK"')}
  %c = f32[8,16]{{1,0}} {call("__cublas$lt$matmul", "bf16[8,4]{1,0}, bf16[4,16]{1,0}", '"lhs_contracting_dimensions":["1"]')}
  %e = f32[8,16]{{1,0}} {call("mosaic_gpu_v2", "bf16[8,4]{1,0}, bf16[4,16]{1,0}, f32[9]{0}")}
  %h = f32[8]{{0}} {call("hidden_kernel", "f32[8]{0}")}
}}
"""  # noqa: E501


def test_what_a_step_computes_and_starts(benchmark):
    """Products by kind of numbers, loops by their trips; a call that is not known is named."""
    cost = benchmark("hlo_cost").cost(MODULE, unknown_trips=2)
    attention = 2 * 2 * (2 * 3 * 16 * 16) * 4
    assert cost.operations == {
        "f32 that were 16-bit": 3 * 2 * 8 * 4 * 16,
        "f32": 2 * 2 * 8 * 8 * 4,
        "bf16": 3 * 2 * 2 * 96 * 8 * 16 + attention // 2 + attention * 5 // 2 + 2 * 8 * 4 * 16,
    }
    assert cost.launches == 3 * 3 + 2 + 5
    assert cost.unknown_loops == 1
    assert cost.calls["mosaic_gpu_v2"] == 7 and cost.calls["__cudnn$fmhaSoftmax"] == 1
    assert cost.uncounted == {"mosaic_gpu_v2": 1, "hidden_kernel": 1}
