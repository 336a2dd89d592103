"""`python -m drlora_jax.export --run DIR --format FORMAT --out DIR`: exports a run's model for
other programs.

  peft     an adapter for `peft`, experts fused as in transformers 5
  peft-2d  an adapter with one pair per expert, for servers that stack experts
  merged   a full model directory in the layout of the base model, the adapter added to its weights

Tested versions: transformers 5.3 with peft 0.19.1 to 0.21.2, transformers 5.24 with peft 0.20 to
0.21.2. Older versions of peft fail, or silently load peft-2d without its experts.

Before an export is kept, its files are read back and must reproduce the run's outputs on a few
texts, in float32. Only one layer is in memory at a time, so this needs no accelerator. If torch is
installed, transformers (and peft) then open the export too, provided that the model fits into
memory in float32. Exit codes: 0 done, 1 the export failed and --out is unchanged, 2 a mistake in
the input.
"""

import argparse
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

import drlora_jax
from drlora_jax import cli
from drlora_jax.config import MeshSection
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.inference.model import rank_gates, read_factors
from drlora_jax.inference.words import of_run
from drlora_jax.interop import peft_write
from drlora_jax.interop.export_check import MAX_KL, Measured, Trained, judge, measure
from drlora_jax.interop.exported_files import check_adapter, check_merged, text_ids
from drlora_jax.interop.hf_read import leaf_at
from drlora_jax.interop.hf_write import cast, rewrite_model, rewritten_bytes
from drlora_jax.interop.layer_reader import LayerReader
from drlora_jax.interop.lora_tables import layer_updates
from drlora_jax.interop.merge import adapted_tensors, column_norms, merge_tensor
from drlora_jax.interop.opened import MERGED, Export, check_opened
from drlora_jax.interop.verify import make_prompts
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.runs.source import RunSource, find_run
from drlora_jax.system.output_dir import check_out, check_space, new_directory
from drlora_jax.system.text import counted

FORMATS = (peft_write.FUSED, peft_write.PER_EXPERT, MERGED)
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class Request(NamedTuple):
    """The arguments of the command."""

    run: str  # run.dir of a training
    out: str  # a new or empty directory
    format: str  # of FORMATS
    step: str = "latest"  # or best, or a number
    model_path: str | None = None  # the base model, if it has moved
    # of all tensors; None: float32 for adapters, the base model's own dtypes for merged
    dtype: str | None = None
    # of merged weights, such as 5GB; None: sharded like the base model
    max_shard_size: str | None = None


def main(argv=None) -> int:
    export(Request(**vars(_parse(argv))))
    return EXIT_DONE


def export(request: Request) -> None:
    """Writes a run's model, and keeps the files only if they read back as the same model.

    Raises:
      UserError: for mistakes in the input.
      RunError: if the files do not reproduce the run's outputs.
    """
    if request.format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {request.format!r}.")
    limit = _shard_bytes(request)
    out = check_out(request.out)
    source = find_run(request.run, step=request.step, model_path=request.model_path)
    _refuse_without_form(source)
    base, is_merged = source.directory, request.format == MERGED
    if is_merged:
        check_space(out, rewritten_bytes(base, request.dtype))
    words = of_run(source)
    tokenizer, ends = words.tokenizer, words.end_token_ids
    for note in words.notes:
        print(f"note     {note}", flush=True)
    trained, source = read_trained(source)
    reader = LayerReader(source.model_config, base)
    adapter = None if is_merged else make_adapter(trained, reader, request.format, request.dtype)
    if adapter:
        check_space(out, sum(value.nbytes for value in adapter.tensors.values()))
    with new_directory(out) as draft:
        if adapter:
            peft_write.write(draft, adapter, _base_name(source), _origin(source))
            lines = _adapter_lines(adapter)
        else:
            lines = write_merged(
                draft, base, trained, reader, request.dtype, limit, ends, words.restored
            )
        print("\n".join([_describe(source, trained), *lines]), flush=True)
        _check(draft, request, trained, reader, base, tokenizer, ends)
    print(f"done: {request.format} in {request.out}")


def _check(
    draft, request: Request, trained: Trained, reader: LayerReader, base, tokenizer, ends
) -> None:
    """Checks the export as computed here, as its files declare, and as other libraries read it."""
    prompts = make_prompts(tokenizer, trained.config.vocab_size)
    is_merged = request.format == MERGED
    measured = measure(trained, reader, draft, prompts, is_merged=is_merged, dtype=request.dtype)
    judge(measured)
    print("\n".join(_measured_lines(measured)), flush=True)
    ids = text_ids(tokenizer)
    if is_merged:
        check_merged(base, draft, ids, request.dtype)
    else:
        check_adapter(draft)
    written = Export(request.format, base, draft, prompts, list(measured.logits), ids, ends)
    print("\n".join(check_opened(written)), flush=True)


def _refuse_without_form(source: RunSource) -> None:
    reason = source.adapter.why_no_export(str(source.run_dir))
    if reason:
        raise UserError(
            f"{source.run_dir} was trained with adapter.kind={source.adapter.kind}: {reason} "
            "(docs/methods.md); drlora_jax.evaluate and drlora_jax.generate use the run itself."
        )


def _parse(argv) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m drlora_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="run.dir of a training")
    parser.add_argument("--step", default="latest", help="latest (default), best, or a number")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see above")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument("--model-path", metavar="PATH", help="the base model, if it has moved")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of all tensors (default: float32 for adapters, the base model's own dtypes "
        "for merged)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="largest file of merged weights, such as 5GB (default: sharded like the base model)",
    )
    return parser.parse_args(argv)


def _shard_bytes(request: Request) -> int | None:
    if request.max_shard_size is None:
        return None
    if request.format != MERGED:
        raise UserError(
            f"--max-shard-size applies to --format merged; {request.format} is always one file."
        )
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", request.max_shard_size, re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size must look like 5GB, got {request.max_shard_size!r}.")
    return size


# ------------------------------------------------------------------------------------------ writing


def read_trained(source: RunSource) -> tuple[Trained, RunSource]:
    """Reads LoRA matrices, ranks and gates of the run's checkpoint onto the host; returns them and
    the source with the step that was read.
    """
    config, adapter = source.model_config, source.adapter
    mesh = mesh_lib.make_mesh(mesh_lib.resolve_sizes(MeshSection(), jax.device_count()))
    lora, ranks_LE, source = read_factors(source, mesh)
    model = Decoder(config, DecoderOptions(adapter=adapter))
    lora, gates = jax.device_get((lora, rank_gates(model, ranks_LE, mesh)))
    updates = layer_updates(config, adapter, lora, ranks_LE)
    return Trained(config, adapter, lora, gates, updates), source


def make_adapter(
    trained: Trained, reader: LayerReader, layout: str, dtype: str | None
) -> peft_write.Adapter:
    """Packs the adapter in the layout `peft` or `peft-2d`, in `dtype` (None: f32)."""
    routers = {
        update.layer.number: reader.layer(update.layer)["moe"]["router"] + update.router_DE
        for update in trained.updates
        if update.router_DE is not None
    }
    magnitudes = {
        (update.layer.number, path): column_norms(
            leaf_at(reader.layer(update.layer), (*path.split("/"), "kernel"))
        )
        + growth_F
        for update in trained.updates
        for path, growth_F in update.magnitudes.items()
    }
    adapter = peft_write.pack(trained.config, trained.updates, routers, layout, magnitudes)
    kind = np.dtype(dtype or np.float32)
    tensors = {key: cast(key, value, kind) for key, value in adapter.tensors.items()}
    return adapter._replace(tensors=tensors)


def _base_name(source: RunSource) -> str:
    """Returns a hub name unchanged, anything else as a resolved directory."""
    name, here = source.config.model.path, source.directory.resolve()
    return name if here.parent.name == "snapshots" else str(here)  # where the hub's client puts it


def _origin(source: RunSource) -> dict[str, str]:
    return {
        "producer": f"drlora_jax {drlora_jax.__version__}",
        "step": str(source.step),
        "base_fingerprint": source.base_fingerprint,
    }


def write_merged(
    draft: pathlib.Path,
    base: pathlib.Path,
    trained: Trained,
    reader: LayerReader,
    dtype: str | None,
    max_shard_bytes: int | None,
    end_token_ids: Sequence[int] = (),
    tokenizer_settings: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """Writes the base model's directory with the adapter added; returns the lines to print.

    Args:
      end_token_ids: tokens that end a text of the run, the tokenizer's own first.
      tokenizer_settings: those of the training, if the base model has different ones now.
    """
    changed = adapted_tensors(reader.table, trained.updates)
    notes = rewrite_model(
        base,
        draft,
        changed,
        lambda key, value: merge_tensor(value, reader.table[key], changed[key]),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        end_token_ids=end_token_ids,
        tokenizer_settings=tokenizer_settings,
    )
    lines = [f"merged   {len(changed)} of {len(reader.table)} tensors changed"]
    return lines + [f"note     {note}" for note in notes]


# ----------------------------------------------------------------------------------------- messages


def _describe(source: RunSource, trained: Trained) -> str:
    text = f"run      {source.run_dir}, step {source.step}, base {source.directory}"
    pairs = [pair for update in trained.updates for pair in update.experts.values()]
    if pairs:
        text += f"; ranks up to {max(pair.rank for pair in pairs)}"
    return text


def _adapter_lines(adapter: peft_write.Adapter) -> list[str]:
    size = sum(value.nbytes for value in adapter.tensors.values())
    lines = [
        f"adapter  rank {adapter.rank}, {len(adapter.tensors)} tensors, {size / 2**20:.1f} MiB; "
        f"targets {', '.join([*adapter.modules, *adapter.parameters])}"
    ]
    if adapter.active_share < 0.5:
        lines.append(
            f"note     only {100 * adapter.active_share:.0f} % of the rank rows are active: the "
            "format has one rank for all experts, the rest is padded with zeros"
        )
    if adapter.saved_modules:
        lines.append(
            f"note     the trained router is stored in modules_to_save "
            f"({', '.join(adapter.saved_modules)}), which not every server loads; --format merged "
            "works everywhere"
        )
    return lines


def _measured_lines(measured: Measured) -> list[str]:
    lines = [
        f"checked  {counted(measured.prompts, 'text')}, {counted(measured.tokens, 'token')}: KL "
        f"{measured.exported.kl:.1e} per token (limit {MAX_KL:g}); the adapter changes logits by "
        f"up to {measured.adapter_change:.3g}"
    ]
    if measured.merged is not None:
        lines.append(f"         rounding costs a KL of up to {measured.kl:.1e} per token")
    left_out = measured.prompts - measured.exported.counted
    if left_out:
        lines.append(
            f"         {counted(left_out, 'text')} left out: ties in the choice of experts"
        )
    return lines


if __name__ == "__main__":
    cli.run_and_exit(main)
