"""Compiles the full training step of a config for a TPU topology, without a TPU and its weights.

    python benchmarks/aot_tpu.py --topology v5p:4x4x4 --config configs/mixtral.py \\
        mesh.fsdp=8 mesh.expert=8 train.batch_size=64 train.micro_batches=1

Needs `pip install 'drlora-jax[tpu]'`; nothing runs on a device. The model is that of `--model`: a
config.json or a directory with one, by default the published one in benchmarks/models that
`model.path` names. Prints the memory per chip, the FLOPs and every collective with its bytes per
step. Exits with 1 if the step does not fit a chip, if a collective moves a layer's experts of more
than one expert shard, the logits or the optimizer state of LoRA matrices, or if experts are
computed by a dense expansion.
"""

import argparse
import contextlib
import os
import pathlib

# Before jax is imported: there is no TPU here to ask.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}

import hlo_text as hlo
import jax
from expansions import step_expansions
from jax.experimental import topologies
from jobs import abstract_job, model_values

from drlora_jax import train
from drlora_jax.cli import run_and_exit
from drlora_jax.config import load_config
from drlora_jax.errors import RunError, UserError
from drlora_jax.ops.experts import tokamax
from drlora_jax.parallel.mesh import EXPERTS, shards_of
from drlora_jax.system.text import format_bytes
from drlora_jax.training.costs import flops_per_token
from drlora_jax.training.memory import compiled_bytes

ORIGIN_PARTS = 4  # of an operation's name, from its end
CHIP_GIB = {"v5p": 95, "v6e": 32, "v5e": 16, "v4": 32}


def main(argv=None) -> int:
    args = _arguments(argv)
    config = load_config(args.config, args.overrides)
    devices = _devices(args.topology, args.slices)
    run = train.build(abstract_job(config, model_values(args.model, config), len(devices)), devices)
    uses_tokamax = config.model.experts == "tokamax"
    with tokamax.compiling_elsewhere() if uses_tokamax else contextlib.nullcontext():
        compiled, seconds = train.compile_step(run)
    text = compiled.as_text()
    if args.text:
        pathlib.Path(args.text).write_text(text)
    limit = args.chip_gib or CHIP_GIB[args.topology.split(":")[0]]
    collectives = hlo.collectives(text)
    slices = f" x {args.slices} slices" if args.slices > 1 else ""
    lines = [f"compiled in {seconds:.0f} s for {len(devices)} chips of {args.topology}{slices}"]
    lines += _memory_lines(run, compiled, limit)
    lines += _flops_lines(run, compiled)
    lines += _collective_lines(collectives)
    print("\n".join(lines))
    complaints = _complaints(run, compiled, text, collectives, limit)
    if complaints:
        raise RunError("The step breaks a rule of this check: " + "; ".join(complaints))
    return 0


def _arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5p:4x4x4", help="NAME:SHAPE, such as v6e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="of that topology each")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", help="config.json of the model, or a directory with one")
    parser.add_argument("--chip-gib", type=float, help="memory of a chip, for other generations")
    parser.add_argument("--text", metavar="FILE", help="also write the compiled module there")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_intermixed_args(argv)


def _devices(name: str, slices: int):
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise UserError(
            f"--topology {name}: {str(error).splitlines()[0]}. It needs libtpu "
            "(pip install 'drlora-jax[tpu]') and a name such as v5p:4x4x4."
        ) from error


# ------------------------------------------------------------------------------------------- report


def _memory_lines(run, compiled, limit: float) -> list[str]:
    lines = train.memory_lines(run.abstract_params, run.abstract_state, compiled)
    taken = compiled_bytes(compiled).total / 2**30
    share = f"            {taken:.1f} of {limit:g} GiB of a chip"
    return [run.backends, run.forecast, *lines, share]


def _flops_lines(run, compiled) -> list[str]:
    section, chips = run.job.config.train, run.mesh.size
    tokens = section.batch_size * section.sequence_length
    model = flops_per_token(run.job.model_config, section.sequence_length) * tokens / chips
    return [f"FLOPs       {model / 1e12:.2f} T of the model per step and chip (4 N + attention)"]


def _collective_lines(collectives: list[hlo.Collective]) -> list[str]:
    total = sum(each.bytes * each.times for each in collectives)
    lines = [f"collectives {format_bytes(total)} per step and chip, by result", ""]
    groups: dict = {}
    for each in collectives:
        key = (each.kind, each.shape, each.origin)
        groups[key] = groups.get(key, 0) + each.times
    rows = [(times * hlo.shape_bytes(key[1]), times, *key) for key, times in groups.items()]
    for moved, times, kind, shape, origin in sorted(rows, reverse=True):
        origin = "/".join(origin.split("/")[-ORIGIN_PARTS:])
        lines.append(f"{format_bytes(moved):>10}  {times:5d} x {kind:18} {shape:40} {origin}")
    return lines


def _complaints(run, compiled, text, collectives, limit) -> list[str]:
    found = []
    taken = compiled_bytes(compiled).total / 2**30
    if taken > limit:
        found.append(f"{taken:.1f} GiB do not fit a chip of {limit:g} GiB")
    config = run.job.model_config
    if config.moe is not None:
        found += [f"{each} looks like a dense expansion" for each in step_expansions(run, text)]
    for each in collectives:
        reason = hlo.forbidden(each, forbidden_sizes(run))
        if reason:
            found.append(f"{each.kind} of {each.shape} moves {reason} ({each.origin})")
    return sorted(set(found))


def forbidden_sizes(run) -> hlo.Limits:
    config, expert_shards = run.job.model_config, shards_of(run.mesh, EXPERTS)
    local, matrices = 0, ()
    if config.moe is not None:
        local = config.moe.routing.num_experts // expert_shards
        hidden = config.moe.expert_dim
        # Whole, and cut along their first side: FSDP's gather is of one shard's experts.
        matrices = tuple(
            (rows // parts, columns)
            for rows, columns in ((config.width, 2 * hidden), (hidden, config.width))
            for parts in {1, run.mesh.shape["fsdp"]}
        )
    lora = {
        tuple(size for size in shape if size != 1)
        for leaf in jax.tree.leaves(run.abstract_state.lora)
        if EXPERTS in leaf.sharding.spec and expert_shards > 1
        for shape in (leaf.shape, leaf.shape[1:])  # of all layers, of one
    }
    return hlo.Limits(
        local_experts=local,
        expert_shapes=matrices,
        vocab=config.vocab_size,
        head=config.vocab_size * config.width,
        global_lora=lora,
    )


if __name__ == "__main__":
    run_and_exit(main)
