"""Compiles the full training step of a config for a GPU, without a GPU, its weights, or CUDA.

    python benchmarks/aot_gpu.py --gpu h200 --config configs/olmoe.py \\
        model.remat=selective train.batch_size=4 train.micro_batches=1 train.sequence_length=4096

Needs Python 3.12, jax and `pip install 'drlora-jax[cuda-aot]'` with the plugin of jax's own version
(`jax-cuda13-plugin==$(python -c 'import jax; print(jax.__version__)')`); nothing runs on a device.
The model is that of `--model`: a config.json or a directory with one, by default the published one
in benchmarks/models that `model.path` names, or the bundled one.

Prints the chosen kernels, memory and its forecast, operations of matrix products by number format,
kernel launches per step, and calls of libraries and own kernels. Exits with 1 if the step does not
fit the GPU, if experts are computed by a dense expansion, or if the compiler fails or takes longer
than `--minutes`. The compilation runs in a separate process, because a failed check of the compiler
ends its process. The result is not autotuned: kernels that XLA chooses by timing them on the device
may differ there; number formats, memory and grouped products do not.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys

import gpu_targets

# Before jax is imported: there is no GPU here to ask, and no CUDA whose device functions to use.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {gpu_targets.library_flags()}".strip(),
}
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hlo_cost  # noqa: E402
import jax  # noqa: E402
from expansions import step_expansions  # noqa: E402
from jobs import abstract_job, forecast_bytes, model_values  # noqa: E402

from drlora_jax import train  # noqa: E402
from drlora_jax.cli import run_and_exit  # noqa: E402
from drlora_jax.config import load_config  # noqa: E402
from drlora_jax.errors import RunError, UserError  # noqa: E402
from drlora_jax.ops.cross_entropy import CHUNK_TOKENS  # noqa: E402
from drlora_jax.training.costs import flops_per_token  # noqa: E402
from drlora_jax.training.memory import compiled_bytes  # noqa: E402

HERE = "--compile-here"  # in the process that compiles
NICE = 5


def main(argv=None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    if args.here:
        return compile_here(args)
    return run_apart([sys.executable, __file__, HERE, *arguments], args.minutes)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=sorted(gpu_targets.GPUS), default="h200")
    parser.add_argument("--count", type=int, default=1, help="GPUs of one machine")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", help="config.json of the model, or a directory with one")
    parser.add_argument("--minutes", type=float, default=15, help="that compiling may take")
    parser.add_argument("--text", metavar="FILE", help="also write the compiled module there")
    parser.add_argument(HERE, action="store_true", dest="here", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_intermixed_args(arguments)


def run_apart(command: list[str], minutes: float) -> int:
    """Returns the exit code of a process that compiles, with a deadline."""
    process = subprocess.Popen(command, process_group=0)
    try:
        code = process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        raise RunError(f"The compiler was ended after {minutes:g} minutes (--minutes).") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        raise RunError(f"The compiler ended with {signal.Signals(-code).name}; see above for why.")
    return code


# ---------------------------------------------------------------------------------------- compiling


def compile_here(args) -> int:
    """Compiles, prints the report and raises what it complains of."""
    os.nice(NICE)
    config, gpu = load_config(args.config, args.overrides), gpu_targets.GPUS[args.gpu]
    devices = described_devices(gpu, args.count)
    run = train.build(abstract_job(config, model_values(args.model, config), args.count), devices)
    print(f"{run.backends}\n{run.forecast}", flush=True)
    compiled, seconds = train.compile_step(run)
    text = compiled.as_text()
    if args.text:
        pathlib.Path(args.text).write_text(text)
    section = config.train
    tokens = section.batch_size * section.sequence_length // section.micro_batches // args.count
    # The cross-entropy goes on as long as there are targets: at most over all chunks.
    cost = hlo_cost.cost(text, unknown_trips=-(-tokens // CHUNK_TOKENS))
    taken = compiled_bytes(compiled).total / gpu_targets.GIB
    found = step_expansions(run, text)
    lines = [f"compiled in {seconds:.0f} s for {args.count} x {gpu.name} with {versions()}"]
    lines += train.memory_lines(run.abstract_params, run.abstract_state, compiled)
    lines += [memory_line(run, taken, gpu), *cost_lines(run, cost)]
    lines += [f"expansions  {', '.join(found) or 'none'}"]
    print("\n".join(lines))
    check(found, taken, gpu)
    return 0


def check(found: list[str], taken: float, gpu: gpu_targets.Gpu) -> None:
    """Raises RunError where the step multiplies rows with every expert, or does not fit."""
    complaints = [f"{array} is a dense expansion" for array in found]
    if taken > gpu.gib:
        complaints.append(f"{taken:.1f} GiB do not fit {gpu.gib:g} GiB")
    if complaints:
        raise RunError("The step breaks a rule of this check: " + "; ".join(complaints) + ".")


def described_devices(gpu, count: int):
    try:
        return gpu_targets.devices(gpu, count)
    except (RuntimeError, ImportError, NotImplementedError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        plugin = f"jax-cuda13-plugin=={jax.__version__}"
        raise UserError(
            f"jax cannot compile for an NVIDIA GPU here: {reason}. It needs Python 3.12 or newer "
            f"and the plugin of jax's version (pip install 'drlora-jax[cuda-aot]' {plugin})."
        ) from error


def versions() -> str:
    return f"jax {jax.__version__}, Python {sys.version.split()[0]}"


def memory_line(run, taken: float, gpu) -> str:
    forecast = forecast_bytes(run) / gpu_targets.GIB
    ratio = f"{forecast / taken:.2f} times that"
    return f"            {taken:.2f} of {gpu.gib:g} GiB; forecast {forecast:.2f}, {ratio}"


def cost_lines(run, cost) -> list[str]:
    """Lists operations, launches and calls per step and device."""
    section, each = run.job.config.train, run.mesh.size
    tokens = section.batch_size * section.sequence_length / each
    model = flops_per_token(run.job.model_config, section.sequence_length) * tokens
    kinds = [f"{size / 1e12:.3g} T {kind}" for kind, size in cost.operations.most_common()]
    calls = [f"{count} x {target}" for target, count in cost.calls.most_common()]
    missing = [f"{count} x {target}" for target, count in cost.uncounted.most_common()]
    loops = f"; loops taken at their longest: {cost.unknown_loops}" if cost.unknown_loops else ""
    return [
        f"FLOPs       {', '.join(kinds)}; the model's {model / 1e12:.3g} T (4 N + attention)",
        f"launches    {cost.launches:,} per step{loops}",
        f"calls       {', '.join(calls) or 'none'}; not counted in FLOPs: "
        f"{', '.join(missing) or 'none'}",
    ]


if __name__ == "__main__":
    run_and_exit(main)
