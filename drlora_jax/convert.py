"""Converts MixLoRA adapters of MoE-PEFT and the package `mixlora` to a run directory, and back.

    python -m drlora_jax.convert import --adapter DIR --model BASE --out runs/theirs
    python -m drlora_jax.convert export --run runs/mine --out DIR [--weights bin]

`import` reads adapter_config.json and adapter_model.bin (or .safetensors) and writes a run
directory that `drlora_jax.evaluate` and `drlora_jax.generate` can use; it has no optimizer state,
so training cannot resume from it. `export` writes those two files from a run's checkpoint. A .bin
file is a pickle: it is read with torch's `weights_only`, which builds nothing but tensors, so torch
is needed for it. Their loaders do not read .safetensors.

Differences between the formats:

* top_p routing (`mixlora-dynamic`) is renormalised here and not there, so the same tensors compute
  different functions; both directions require --accept-top-p. Switch routing, temperature, DoRA
  (its magnitudes are not in their files), other adapters (loramoe, mola) and sequence classifiers
  are refused.
* Their file has one rank. Experts with fewer are padded with zeros; `import` reads zeros at the end
  as inactive ranks, so that ranks are restored exactly.
* Every layer has the same experts: a run with experts of rank 0 is refused.
* lora_alpha is an integer. If scale * rank is not, the scale is multiplied into B.
* A separate rank, alpha or dropout of experts (`expert_lora`) is read; written files have none,
  because the package `mixlora` ignores it: a separate scale is multiplied into B.
* lora_dropout=0 is written as 1e-6, because their loader requires more than 0; 1e-6 is read as 0.
* Only base models of the `llama` family are supported, as for adapter.kind=mixlora itself.
"""

import argparse
import dataclasses
import json
import pathlib
import warnings

import jax
import numpy as np
from safetensors.numpy import save_file

from drlora_jax import cli
from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    MeshSection,
    ModelSection,
    RunSection,
    TrainConfig,
)
from drlora_jax.config.resolve import make_adapter
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.inference.model import read_factors
from drlora_jax.interop import mixlora
from drlora_jax.interop.hf_files import (
    find_model,
    fingerprint,
    open_weights,
    read_model_config,
)
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, abstract_lora
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.runs.checkpoint import Checkpoints
from drlora_jax.runs.directory import RunDirectory
from drlora_jax.runs.source import find_run
from drlora_jax.system.imports import load_package
from drlora_jax.system.output_dir import check_out, new_directory
from drlora_jax.system.paths import check_downloaded, local_path, read_json


def main(argv=None) -> int:
    args = _parse(argv)
    return (_import if args.direction == "import" else _export)(args)


def _parse(argv) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m drlora_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    into = directions.add_parser("import", help="convert their files to a run directory")
    into.add_argument("--adapter", required=True, metavar="DIR")
    into.add_argument("--model", required=True, metavar="BASE", help="directory or hub name")
    out_of = directions.add_parser("export", help="convert a run's checkpoint to their files")
    out_of.add_argument("--run", required=True, metavar="DIR")
    out_of.add_argument("--step", default="latest", help="latest (default), best, or a number")
    out_of.add_argument("--model-path", metavar="PATH", help="the base model, if it has moved")
    out_of.add_argument("--weights", choices=("bin", "safetensors"), default="bin")
    for each in (into, out_of):
        each.add_argument("--out", required=True, metavar="DIR", help="a new directory")
        each.add_argument(
            "--accept-top-p",
            action="store_true",
            help="convert top_p routing although it is computed differently (see above)",
        )
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------- in


def _import(args: argparse.Namespace) -> int:
    folder = local_path(args.adapter, "--adapter")
    values = read_json(folder / mixlora.CONFIG)
    described = mixlora.read_description(values, accept_top_p=args.accept_top_p)
    section, out = described.section, check_out(args.out)
    directory = find_model(args.model, option="--model")
    config = read_model_config(directory)
    stored = make_adapter(TrainConfig(adapter=section), config)
    mixlora.check_activation(values, config)
    tensors = mixlora.check_tensors(_read_tensors(folder), config, stored)
    plain, ranks_LE = mixlora.used_ranks(tensors, config, stored)
    run = _run_config(args, dataclasses.replace(section, rank=plain or None), ranks_LE)
    adapter = make_adapter(run, config)
    model = Decoder(config, DecoderOptions(adapter=adapter))
    lora = mixlora.unpack(tensors, config, adapter, abstract_lora(model))
    _write_run(RunDirectory(str(out)), run, fingerprint(directory), lora, ranks_LE)
    print(f"{out}: {len(tensors)} tensors, expert ranks {ranks_LE.min()} to {ranks_LE.max()}")
    return EXIT_DONE


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    file = folder / f"{mixlora.WEIGHTS}.safetensors"
    if file.is_file():
        with open_weights(file) as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    else:
        tensors = _read_pickle(file.with_suffix(".bin"))
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise UserError(f"{folder}: {key} has values that are not finite; use another copy.")
    return tensors


def _read_pickle(file: pathlib.Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"{file.parent} has no {mixlora.WEIGHTS}.safetensors and no {file.name}.")
    check_downloaded(file)
    torch = load_package("torch", f"Reading {file}")
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.load(file, map_location="cpu", weights_only=True)
    # Bytes that are no pickle can raise anything. torch's own advice is not repeated: it would run
    # the code that a pickle may contain.
    except Exception as error:
        raise UserError(
            f"{file} is truncated, damaged or contains more than tensors "
            f"({type(error).__name__}); copy it again, or save the tensors as .safetensors."
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()
    ):
        raise UserError(
            f"{file} must be a dict of tensors by name; give the weights of an adapter."
        )
    return {key: value.float().numpy() for key, value in found.items()}


def _run_config(args, section: AdapterSection, ranks_LE: np.ndarray) -> TrainConfig:
    """Builds the run's config: equal ranks are a uniform allocation, others come from the run's own
    ranks.jsonl.
    """
    rank = max(int(ranks_LE.max()), 1)
    kind = "uniform" if (ranks_LE == rank).all() else "pattern"
    pattern = f"{args.out}/ranks.jsonl" if kind == "pattern" else None
    return TrainConfig(
        run=RunSection(dir=args.out),
        model=ModelSection(path=args.model),
        adapter=section,
        allocation=AllocationSection(kind=kind, r_target=rank, r_max=rank, pattern=pattern),
    )


def _write_run(run_dir: RunDirectory, run: TrainConfig, base: str, lora, ranks_LE) -> None:
    source = "an adapter of MoE-PEFT, without training data"
    origin = {"base_fingerprint": base, "data_fingerprint": source}
    run_dir.create(run, origin, schedule_steps=1)
    budget = int(ranks_LE.sum(axis=1).max())
    run_dir.log_ranks(0, tuple(range(len(ranks_LE))), ranks_LE, np.zeros(ranks_LE.shape), budget)
    state = jax.tree.map(jax.numpy.asarray, {"lora": lora, "ranks_LE": ranks_LE})
    checkpoints = Checkpoints(run_dir.checkpoints, keep_last=1)
    checkpoints.save(0, state, {"tokens": 0})
    checkpoints.close()


# ---------------------------------------------------------------------------------------------- out


def _export(args: argparse.Namespace) -> int:
    source = find_run(args.run, step=args.step, model_path=args.model_path)
    section, out = source.config.adapter, check_out(args.out)
    if section.kind != "mixlora":
        raise UserError(
            f"{args.run} was trained with adapter.kind={section.kind}, which is not MixLoRA; use "
            "python -m drlora_jax.export."
        )
    if section.top_p is not None and not args.accept_top_p:
        raise UserError(
            f"{args.run} has adapter.top_p={section.top_p}: combine weights are renormalised here "
            "but not in MoE-PEFT, so its outputs would differ. To export it anyway, add "
            "--accept-top-p."
        )
    mesh = mesh_lib.make_mesh(mesh_lib.resolve_sizes(MeshSection(), jax.device_count()))
    lora, ranks_LE, source = read_factors(source, mesh)
    tensors, rank = mixlora.pack(source.model_config, source.adapter, lora, ranks_LE)
    values = mixlora.describe(
        source.model_config, source.adapter, section, rank, source.config.model.path
    )
    with new_directory(out) as draft:
        (draft / mixlora.CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        _write_tensors(draft / f"{mixlora.WEIGHTS}.{args.weights}", tensors)
    print(f"{out}: {len(tensors)} tensors of rank {rank}, step {source.step}")
    return EXIT_DONE


def _write_tensors(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    if file.suffix == ".safetensors":
        save_file(tensors, file, {"format": "pt"})
        return
    torch = load_package("torch", f"Writing {file.name} (without torch: --weights safetensors)")
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, file)


if __name__ == "__main__":
    cli.run_and_exit(main)
