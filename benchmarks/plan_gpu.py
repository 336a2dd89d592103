"""Forecasts the memory of a step on each of N GPUs: no GPU, no weights, nothing compiled.

    python benchmarks/plan_gpu.py --devices 8 --config configs/mixtral.py mesh.data=1 mesh.expert=8

`benchmarks/aot_gpu.py` and `aot_tpu.py` compile the step itself, which takes minutes and a plugin.
"""

import argparse
import os
import sys

COUNT = [word.partition("=")[2] for word in sys.argv if word.startswith("--devices=")]
COUNT += [sys.argv[at + 1] for at, word in enumerate(sys.argv[:-1]) if word == "--devices"]
# Before jax is imported: shardings need devices to name, of whatever kind.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={(COUNT or ['1'])[0]}",
}

from jobs import abstract_job, model_values  # noqa: E402

from drlora_jax import train  # noqa: E402
from drlora_jax.cli import run_and_exit  # noqa: E402
from drlora_jax.config import load_config  # noqa: E402
from drlora_jax.system.text import format_bytes  # noqa: E402
from drlora_jax.training.costs import memory_forecast  # noqa: E402
from drlora_jax.training.memory import bytes_on_one_device  # noqa: E402
from drlora_jax.training.program import memory_layout  # noqa: E402


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", help="config.json of the model, or a directory with one")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    job = abstract_job(config, model_values(args.model, config), args.devices)
    run = train.build(job)
    parts = (run.abstract_params, run.abstract_state.lora, run.abstract_state.opt_state)
    base, lora, moments = (format_bytes(bytes_on_one_device(part)) for part in parts)
    layout = memory_layout(job, run.mesh, "mosaic")
    print(f"memory      base {base}, adapter {lora}, moments {moments} on each of {args.devices}")
    states = (run.abstract_params, run.abstract_state)
    print(memory_forecast(job.model_config, layout, *states, config.model.remat))
    return 0


if __name__ == "__main__":
    run_and_exit(main)
