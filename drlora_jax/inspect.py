"""`python -m drlora_jax.inspect DIR`: summarises a model directory or a run directory.

For a model: its architecture, and its parameters by kind, in total and active per token. For a run
also what was adapted, its progress, checkpoints and ranks. Only reads files: no network, no device,
nothing is executed or changed.
"""

import argparse
import json
import pathlib
import statistics
from typing import NamedTuple

from drlora_jax import cli
from drlora_jax.adapters.targets import coverage, coverage_lines
from drlora_jax.config import from_flat
from drlora_jax.config.resolve import make_adapter
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.interop.hf_files import find_model, has_weights, read_headers, read_model_config
from drlora_jax.interop.hf_read import match_keys
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.placement import NO_ADAPTER, Placement
from drlora_jax.models.transformer import Decoder, abstract_params
from drlora_jax.reporting.read import RunLog, budgets, frames, layer_indices, read_run
from drlora_jax.reporting.tables import figures
from drlora_jax.system.paths import ABSENT, kind_of, local_path, numbered_folders
from drlora_jax.system.text import counted, format_bytes


def main(argv=None) -> int:
    parser = cli.Parser(
        prog="python -m drlora_jax.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", metavar="DIR", help="a run.dir, a model directory, or bundled:NAME")
    path = parser.parse_args(argv).dir
    lines = run_lines(local_path(path, "DIR")) if is_run(path) else model_lines(path)
    print("\n".join(lines))
    return EXIT_DONE


def is_run(path: str) -> bool:
    """Returns whether the directory's config.json belongs to a run and not to a model."""
    try:
        found = json.loads((local_path(path, "DIR") / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and isinstance(found.get("config"), dict)


# ------------------------------------------------------------------------------------------- models


class Kind(NamedTuple):
    """The weight matrices of one kind: attention, experts, router, ..."""

    name: str
    parameters: int
    active: int  # those that one token is multiplied with


def model_lines(path: str) -> list[str]:
    directory = find_local(path)
    config = read_model_config(directory)
    weights = _weight_lines(directory, config)
    return [*architecture_lines(path, config), *weights, "", *kind_lines(config)]


def find_local(path: str) -> pathlib.Path:
    """Returns a model's directory on this machine; hub names are not downloaded."""
    if not path.startswith("bundled:") and kind_of(local_path(path, "DIR")) == ABSENT:
        raise UserError(
            f"{path}: no such directory; give a model directory, a run.dir or bundled:NAME "
            "(inspect does not use the network)."
        )
    return find_model(path, option="DIR")


def architecture_lines(
    path: str, config: ModelConfig, adapter: Placement = NO_ADAPTER
) -> list[str]:
    layers = [layer.config for layer in config.layers()]
    lines = [
        f"model       {path}: {config.family}, {len(layers)} layers of width {config.width:,}, "
        f"vocabulary {config.vocab_size:,}, "
        f"{'tied' if config.tie_embeddings else 'untied'} embeddings"
    ]
    for each in dict.fromkeys(layer.attention for layer in layers):
        window = f", window {each.window:,}" if each.window else ""
        lines.append(
            f"attention   {each.num_heads} query heads, {each.num_kv_heads} key heads of "
            f"{each.head_dim}{window}"
        )
    routing = adapter.routing(config)
    if routing:
        kind = f"hidden width {config.moe.expert_dim:,}" if config.moe else "LoRA experts (at most)"
        lines.append(
            f"experts     {routing.num_experts} per layer in "
            f"{len(adapter.expert_layers(config))} layers, "
            f"{routing.experts_per_token} per token, {kind}"
        )
    return lines


def _weight_lines(directory: pathlib.Path, config: ModelConfig) -> list[str]:
    """Describes the weights, after the checks that loading them begins with."""
    if not has_weights(directory):
        return ["weights     none here"]
    headers = read_headers(directory)
    match_keys(config, headers, abstract_params(Decoder(config, DecoderOptions())))
    dtypes = sorted({info.dtype for info in headers.values()})
    files = {info.file for info in headers.values()}
    size = sum(file.stat().st_size for file in files)
    return [
        f"weights     {counted(f'{len(headers):,}', 'tensor')} of {', '.join(dtypes)} in "
        f"{counted(len(files), 'file')}, {format_bytes(size)}"
    ]


def parameters_by_kind(config: ModelConfig) -> list[Kind]:
    """Counts the parameters of weight matrices; norms and biases are not counted."""
    kinds: dict[str, Kind] = {}
    for matrix in config.matrices():
        active = matrix.active * matrix.in_features * matrix.out_features
        before = kinds.get(matrix.kind, Kind(matrix.kind, 0, 0))
        kinds[matrix.kind] = Kind(
            matrix.kind, before.parameters + matrix.parameters, before.active + active
        )
    return list(kinds.values())


def kind_lines(config: ModelConfig) -> list[str]:
    kinds = parameters_by_kind(config)
    kinds.append(Kind("total", sum(k.parameters for k in kinds), sum(k.active for k in kinds)))
    lines = [f"{'parameters':<12}{'total':>18}{'active per token':>18}"]
    return lines + [f"{k.name:<12}{k.parameters:>18,}{k.active:>18,}" for k in kinds]


# --------------------------------------------------------------------------------------------- runs


def run_lines(directory: pathlib.Path) -> list[str]:
    run = read_run(directory)
    lines = [f"run         {directory}"]
    lines += [
        f"{name.lower():<18}{figure.value}  ({figure.detail})".replace("  ()", "")
        for name, figure in figures(run).items()
    ]
    steps = numbered_folders(directory / "checkpoints")
    lines.append(f"{'checkpoints':<18}{', '.join(map(str, steps)) or 'none'}")
    return [*lines, "", *_base_lines(run), *rank_lines(run)]


def _base_lines(run: RunLog) -> list[str]:
    """Describes architecture and adapter; a base model that is not on this machine is only
    named.
    """
    try:
        config = from_flat(run.config)
        model = read_model_config(find_local(config.model.path))
        adapter = make_adapter(config, model)
        rows = coverage(model, adapter, config.adapter.targets)
    except UserError as error:
        return [f"base        {run.config.get('model.path')}: {error}"]
    architecture = architecture_lines(config.model.path, model, adapter)
    return [*architecture, "", *kind_lines(model), "", *coverage_lines(rows)]


def rank_lines(run: RunLog) -> list[str]:
    """Returns the active ranks of every layer after the last event."""
    found = frames(run, "ranks")
    if not found:
        return []
    step, values = found[-1]
    limits = budgets(run, len(values)) or []
    width = max((len(f" of {limit:,}") for limit in limits), default=0)
    lines = ["", f"ranks after step {step}", "layer     sum" + " " * width + "   mean   min max"]
    for index, (layer, row) in enumerate(zip(layer_indices(run, len(values)), values, strict=True)):
        mean = statistics.fmean(row) if row else 0.0
        low, high = min(row, default=0), max(row, default=0)
        of = f" of {limits[index]:,}" if limits else ""
        lines.append(f"{layer:<6}{sum(row):>7,}{of:<{width}}{mean:>7.2f}{low:>6}{high:>4}")
    return lines


if __name__ == "__main__":
    cli.run_and_exit(main)
