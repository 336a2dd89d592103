"""`python -m drlora_jax.evaluation.compare A.jsonl B.jsonl`: compares two evaluations.

Both files were written by `drlora_jax.evaluate` for the same task, for example for a base model and
a run. The items are paired, and a difference is reported as one only if it exceeds noise.
"""

import argparse
import json

from drlora_jax import cli
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.evaluation import statistics
from drlora_jax.system.paths import check_downloaded, local_path


def main(argv=None) -> int:
    parser = cli.Parser(
        prog="python -m drlora_jax.evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A.jsonl")
    parser.add_argument("second", metavar="B.jsonl")
    args = parser.parse_args(argv)
    print(compare_files(args.first, args.second))
    return EXIT_DONE


def read_samples(file: str) -> dict[str, dict]:
    """Reads the lines of a file of samples, by id."""
    path = local_path(file)
    check_downloaded(path)
    try:
        content = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in content.splitlines()]
        return {line["id"]: line for line in lines if line["values"] is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a file of samples ({type(error).__name__}: {error}); give one of "
            "<run>/eval/*.jsonl."
        ) from error


def compare_files(first: str, second: str) -> str:
    """Describes the second evaluation minus the first, paired item by item."""
    samples = [read_samples(file) for file in (first, second)]
    metrics = [list(next(iter(lines.values()), {"values": {}})["values"]) for lines in samples]
    if metrics[0] != metrics[1] or not metrics[0]:
        raise UserError(f"{first} and {second} have different metrics; compare the same task.")
    changed = [
        key
        for key in samples[0].keys() & samples[1].keys()
        if samples[0][key].get("prompt") != samples[1][key].get("prompt")
    ]
    if changed:
        raise UserError(
            f"{len(changed)} items have different prompts in {first} and {second} (id "
            f"{changed[0]}); evaluate both with the same task, template and shots."
        )
    lines = []
    for metric in metrics[0]:
        pair = [
            {key: (line["values"][metric], line["weight"]) for key, line in each.items()}
            for each in samples
        ]
        lines.append(_sentence(metric, statistics.compare(*pair)))
    return "\n".join(lines)


def _sentence(metric: str, found: statistics.Comparison) -> str:
    ends = (
        ""
        if found.ci95 is None
        else f", 95 % interval {found.ci95[0]:+.4f} to {found.ci95[1]:+.4f}"
    )
    shown = "a difference" if found.is_shown else "within noise: no difference is shown"
    return (
        f"{metric}: second - first = {found.difference:+.4f} (n {found.n}{ends}, p "
        f"{found.p_value:.2g}): {shown}"
    )


if __name__ == "__main__":
    cli.run_and_exit(main)
