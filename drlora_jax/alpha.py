"""`python -m drlora_jax.alpha MODEL --experts 160`: measures how heavy-tailed the weights of each
layer are, and how many LoRA experts AlphaLoRA (arXiv 2410.10054) assigns to the layer.

MODEL is a directory, a hub name or bundled:NAME, dense or MoE. Nothing is trained and no device is
used. The spectra of the weights are cached: the same model takes seconds with other options, and an
interrupted analysis resumes.
"""

import os

if __name__ == "__main__":
    # One thread per matrix, not several in BLAS: those wait for each other by spinning, which made
    # a matrix take tens of times as long on a busy machine. It must be set before NumPy loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from drlora_jax import cli
from drlora_jax.allocation.alphalora import ROUNDINGS, allocate_experts
from drlora_jax.allocation.spectra import ESTIMATORS
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.interop.hf_files import find_model, fingerprint, read_model_config
from drlora_jax.interop.spectra_read import (
    LayerFit,
    default_cache,
    fit_layers,
    open_cache,
    with_progress,
)
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.reporting.alpha_chart import draw_layers
from drlora_jax.system.paths import ABSENT, DIRECTORY, FILE, kind_of, local_path, write_result

LONGEST_BAR = 40  # characters
_ESTIMATOR_TEXTS = {
    "fix_finger": "fits the tail above the peak of each matrix's spectrum (as in the paper)",
    "median": "fits the upper half of each matrix's spectrum (plain Hill estimator)",
}
MOST_THREADS = 8  # by default; each needs 0.9 GiB for the matrices of a 7B model


class Result(NamedTuple):
    """The results of a model's analysis."""

    layers: list[LayerFit]
    experts_L: np.ndarray

    @property
    def alpha_L(self) -> list[float]:
        return [each.alpha for each in self.layers]


def main(argv=None) -> int:
    args = _parse(argv)
    files = [_check_file(name, getattr(args, name)) for name in ("out", "svg")]
    directory = find_model(args.model, option="MODEL")
    config = read_model_config(directory)
    cli.check_positive(args, "threads")
    _allocate(args, [1.0] * config.num_layers)  # refuses bad options before the analysis
    cache = None if args.no_cache else open_cache(args.cache)
    print(f"model       {args.model}: {config.family}, {config.num_layers} layers", flush=True)
    layers = list(with_progress(_fits(args, config, directory, cache), config.num_layers))
    result = Result(layers, _allocate(args, [each.alpha for each in layers]))
    print("\n".join(table(args, result)))
    contents = (
        lambda: json.dumps(record(args, result, fingerprint(directory)), indent=1) + "\n",
        lambda: draw_layers(result.alpha_L, result.experts_L.tolist(), title=args.model),
    )
    for file, make in zip(files, contents, strict=True):
        if file:
            _write(file, make())
    return EXIT_DONE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m drlora_jax.alpha",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, a hub name or bundled:NAME")
    parser.add_argument(
        "--experts", type=int, required=True, metavar="N", help="total to distribute over layers"
    )
    parser.add_argument(
        "--beta",
        type=float,
        default=2.5,
        help="a layer's share is proportional to alpha^beta; 0: equal shares (default: 2.5)",
    )
    parser.add_argument(
        "--estimator",
        choices=ESTIMATORS,
        default="fix_finger",
        help="where the tail begins: near the peak of the spectrum (fix_finger, the default), or "
        "at its median",
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="largest_remainder",
        help="largest_remainder (default): nearest to the shares, at least one per layer; or as "
        "the authors' code",
    )
    parser.add_argument(
        "--out", metavar="FILE.json", help="write the exponents of all matrices to this file"
    )
    parser.add_argument(
        "--svg", metavar="FILE.svg", help="write a chart of exponents and experts to this file"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=_free_cores(),
        help="matrices computed at once (default: the number of cores, at most 8)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--cache", metavar="DIR", help=f"cache of spectra (default: {default_cache()})"
    )
    where.add_argument("--no-cache", action="store_true", help="use no cache")
    return parser.parse_args(argv)


def _free_cores() -> int:
    """Returns the cores that this process may use, or 1 if BLAS was told to use several itself."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        return 1
    is_told = hasattr(os, "sched_getaffinity")  # by Linux
    cores = len(os.sched_getaffinity(0)) if is_told else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


def _check_file(name: str, path: str | None) -> pathlib.Path | None:
    """Returns a file that can be written, or None if none is requested."""
    if path is None:
        return None
    file = local_path(path, f"--{name}")
    if kind_of(file) not in (FILE, ABSENT) or kind_of(file.absolute().parent) != DIRECTORY:
        raise UserError(f"--{name} {path}: give a file in a directory that exists.")
    return file


def _allocate(args: argparse.Namespace, alpha_L: list[float]) -> np.ndarray:
    try:
        return allocate_experts(alpha_L, args.experts, beta=args.beta, rounding=args.rounding)
    except UserError as error:
        raise UserError(f"--experts {args.experts} --beta {args.beta:g}: {error}") from error


def _fits(args, config: ModelConfig, directory, cache) -> Iterator[LayerFit]:
    return fit_layers(
        config, directory, estimator=args.estimator, cache=cache, threads=args.threads
    )


# ------------------------------------------------------------------------------------------ results


def table(args: argparse.Namespace, result: Result) -> list[str]:
    """Returns one line per layer, with a bar in proportion to its exponent."""
    largest = max(result.alpha_L)
    room = min(shutil.get_terminal_size().columns - 34, LONGEST_BAR)
    block = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    lines = [f"estimator   {args.estimator}, {_cached(result.layers)}", ""]
    lines.append("layer     alpha  matrices  experts")
    for fit, experts in zip(result.layers, result.experts_L, strict=True):
        bar = block * max(round(fit.alpha / largest * room), 1)
        lines.append(f"{fit.layer:>5}{fit.alpha:>10.4f}{len(fit.matrices):>10}{experts:>9}  {bar}")
    matrices = sum(len(fit.matrices) for fit in result.layers)
    mean, total = np.mean(result.alpha_L), result.experts_L.sum()
    lines.append(f" mean{mean:>10.4f}{matrices:>10}{total:>9}  in all, by alpha^{args.beta:g}")
    empty = [fit.layer for fit, n in zip(result.layers, result.experts_L, strict=True) if n < 1]
    lines += [
        "",
        "alpha      heavy-tail exponent of a layer's weights, the mean over its matrices; larger "
        "means lighter tails",
        f"experts    distributed in proportion to alpha^{args.beta:g} (--beta)",
        f"{args.estimator:<11}{_ESTIMATOR_TEXTS[args.estimator]}",
    ]
    if empty:
        lines += ["", f"The authors' rounding leaves layers without an expert: {empty}."]
    return lines


def _cached(layers: list[LayerFit]) -> str:
    count = sum(fit.is_cached for fit in layers)
    return "spectra computed" if not count else f"spectra of {count} layers from the cache"


def record(args: argparse.Namespace, result: Result, identity: str) -> dict:
    """Returns the content of --out."""
    layers = []
    for fit, experts in zip(result.layers, result.experts_L.tolist(), strict=True):
        matrices = [
            {
                "name": matrix.key,
                "role": matrix.role,
                "expert": matrix.expert,
                "shape": list(matrix.shape),
                "alpha": tail.alpha,
                "tail": tail.first,
                "ks": tail.distance,
            }
            for matrix, tail in fit.matrices
        ]
        layers.append(
            {"layer": fit.layer, "alpha": fit.alpha, "experts": experts, "matrices": matrices}
        )
    return {
        "model": args.model,
        "fingerprint": identity,
        "estimator": args.estimator,
        "beta": args.beta,
        "rounding": args.rounding,
        "experts": args.experts,
        "layers": layers,
    }


def _write(file: pathlib.Path, text: str) -> None:
    write_result(file, text)
    print(f"wrote {file}")


if __name__ == "__main__":
    # JAX is used for shapes only: an accelerator may be in use by somebody else.
    jax.config.update("jax_platforms", "cpu")
    cli.run_and_exit(main)
