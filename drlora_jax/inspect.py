"""`python -m drlora_jax.inspect DIR`: what a model directory or a run directory holds.

Of a model: its architecture, and its parameters by kind, in all and those that one token is
multiplied with. Of a run also what was adapted, how far it came, its checkpoints and ranks. Reads
files only: no network, no device, nothing is executed or changed.
"""

import argparse
import json
import pathlib
import statistics
from typing import NamedTuple

from drlora_jax import cli
from drlora_jax.adapters.resolve import make_adapter, with_adapter_experts
from drlora_jax.adapters.targets import coverage, coverage_lines, matrices
from drlora_jax.config import TrainConfig, from_dict
from drlora_jax.config.flat import nested
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.interop.hf_files import find_model, has_weights, read_headers, read_model_config
from drlora_jax.interop.hf_read import match_keys
from drlora_jax.models.architecture import ModelConfig, MoeConfig
from drlora_jax.models.transformer import Decoder, DecoderOptions, abstract_params
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
    """Whether config.json there is of a run, and not of a model."""
    try:
        found = json.loads((local_path(path, "DIR") / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and isinstance(found.get("config"), dict)


# ---------------------------------------------------------------------------------------------
# models


class Kind(NamedTuple):
    """The weight matrices of one kind: attention, experts, router, ..."""

    name: str
    parameters: int
    active: int  # that one token is multiplied with


def model_lines(path: str) -> list[str]:
    directory = find_local(path)
    config = read_model_config(directory)
    weights = _weight_lines(directory, config)
    return [*architecture_lines(path, config), *weights, "", *kind_lines(config)]


def find_local(path: str) -> pathlib.Path:
    """The directory of a model that is on this machine; a hub name is not looked up."""
    if not path.startswith("bundled:") and kind_of(local_path(path, "DIR")) == ABSENT:
        raise UserError(
            f"{path}: no such directory; give a model directory, a run.dir or bundled:NAME "
            "(inspect does not use the network)."
        )
    return find_model(path, option="DIR")


def architecture_lines(path: str, config: ModelConfig) -> list[str]:
    layers = [layer for segment in config.segments for layer in segment.unit * segment.repeats]
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
    if config.routing:
        routing = config.routing
        kind = "of LoRA (at most)"
        if isinstance(config.moe, MoeConfig):
            kind = f"of hidden width {config.moe.expert_dim:,}"
        lines.append(
            f"experts     {routing.num_experts} a layer in {len(config.moe_layers)} layers, "
            f"{routing.experts_per_token} a token, {kind}"
        )
    return lines


def _weight_lines(directory: pathlib.Path, config: ModelConfig) -> list[str]:
    """What the weights are, after the checks that loading them begins with."""
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
    """Weight matrices; norms and biases are not counted."""
    kinds: dict[str, Kind] = {}
    for matrix in matrices(config):
        count = matrix.parameters
        if matrix.kind == "experts":
            routing = config.moe.routing
            active = count * routing.experts_per_token // routing.num_experts
        elif matrix.kind == "embedding":  # a token looks its row up; tied, it is the head, too
            active = count if config.tie_embeddings else 0
        else:
            active = count
        before = kinds.get(matrix.kind, Kind(matrix.kind, 0, 0))
        kinds[matrix.kind] = Kind(matrix.kind, before.parameters + count, before.active + active)
    return list(kinds.values())


def kind_lines(config: ModelConfig) -> list[str]:
    kinds = parameters_by_kind(config)
    kinds.append(Kind("total", sum(k.parameters for k in kinds), sum(k.active for k in kinds)))
    lines = [f"{'parameters':<12}{'in all':>18}{'active a token':>18}"]
    return lines + [f"{k.name:<12}{k.parameters:>18,}{k.active:>18,}" for k in kinds]


# ---------------------------------------------------------------------------------------------
# runs


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
    """Architecture and what is adapted; a base that is not on this machine is only named."""
    try:
        config = _stored_config(run)
        model = read_model_config(find_local(config.model.path))
        model = with_adapter_experts(model, config.adapter)
        rows = coverage(model, make_adapter(config, model), config.adapter.targets)
    except UserError as error:
        return [f"base        {run.config.get('model.path')}: {error}"]
    architecture = architecture_lines(config.model.path, model)
    return [*architecture, "", *kind_lines(model), "", *coverage_lines(rows)]


def _stored_config(run: RunLog) -> TrainConfig:
    return from_dict(nested(run.config))


def rank_lines(run: RunLog) -> list[str]:
    """Active ranks of every layer after the last event."""
    found = frames(run, "ranks")
    if not found:
        return []
    step, values = found[-1]
    limits = budgets(run, len(values)) or []
    width = max((len(f" of {limit:,}") for limit in limits), default=0)
    lines = ["", f"ranks after step {step}", "layer     sum" + " " * width + "   mean  from  to"]
    for index, (layer, row) in enumerate(zip(layer_indices(run, len(values)), values, strict=True)):
        mean = statistics.fmean(row) if row else 0.0
        low, high = min(row, default=0), max(row, default=0)
        of = f" of {limits[index]:,}" if limits else ""
        lines.append(f"{layer:<6}{sum(row):>7,}{of:<{width}}{mean:>7.2f}{low:>6}{high:>4}")
    return lines


if __name__ == "__main__":
    cli.run_and_exit(main)
