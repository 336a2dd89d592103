"""Writes tables and plots of a study from experiments/results/<study>.json alone.

    python -m experiments.report --study experiments/growth.py

Rewrites the blocks between `<!-- NAME -->` and `<!-- end -->` of docs/results.md and the plots in
docs/images/results; the text around the blocks is written by hand. Plots need matplotlib
(`pip install -e ".[experiments]"`); `--tables` skips them.
"""

import argparse
import pathlib
import re
import statistics

import numpy as np

from drlora_jax.evaluation.statistics import mutual_information
from drlora_jax.system.paths import read_json
from experiments import analyse, plots
from experiments.results import read_results
from experiments.study import Study, load_study

ROOT = pathlib.Path(__file__).parents[1]
DOCS, BUNDLED = ROOT / "docs", ROOT / "drlora_jax" / "bundled" / "tiny_moe"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=pathlib.Path, required=True)
    parser.add_argument("--tables", action="store_true", help="no plots")
    args = parser.parse_args()
    study = load_study(args.study)
    results = read_results(study.name)
    page = DOCS / "results.md"
    page.write_text(fill(page.read_text("utf-8"), tables(study, results)), encoding="utf-8")
    if not args.tables:
        plots.draw_all(study, results, DOCS / "images" / "results")


def fill(page: str, blocks: dict[str, str]) -> str:
    """Returns the page with the named blocks replaced; a block that the page lacks is left out."""
    for name, text in blocks.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        page = re.sub(
            pattern, lambda found, text=text: found[1] + text + found[2], page, flags=re.S
        )
    return page


def tables(study: Study, results: dict) -> dict[str, str]:
    """Returns Markdown by block name."""
    blocks = {}
    for task in study.tasks:
        blocks[f"losses {task.name}"] = loss_table(study, results, task.name)
        blocks[f"rates {task.name}"] = rate_table(study, results, task.name)
        blocks[f"ranks {task.name}"] = rank_table(study, results, task.name)
    blocks["configs"] = config_table(study, results)
    blocks["where and when"] = contrast_table(study, results)
    blocks["information"] = information_table(study, results)
    blocks["cost"] = cost_table(study, results)
    return blocks


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def _difference(found: analyse.Paired | None) -> str:
    if found is None:
        return ""
    mark = "**" if found.is_shown else ""
    return f"{mark}{found.mean:+.4f}{mark} ({found.low:+.4f} to {found.high:+.4f})"


def loss_table(study: Study, results: dict, task: str) -> str:
    """Lists arms by loss; a difference to the reference is bold if its interval excludes 0."""
    rows = []
    for arm in study.arms:
        cells = analyse.select(results, task=task, arm=arm.name)
        if not cells:
            continue
        losses = [cell["test_loss"] for cell in cells.values()]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        rate = next(iter(cells.values()))["learning_rate"]
        versus = analyse.compare(results, task, study.reference, arm.name)
        is_reference = arm.name == study.reference
        rows.append(
            [
                f"`{arm.name}`: {arm.about}",
                f"{rate:g}",
                f"{statistics.mean(losses):.4f} ± {spread:.4f}",
                "" if is_reference else _difference(versus),
                str(len(losses)),
            ]
        )
    head = ["arm", "learning rate", "loss ± sd", f"minus `{study.reference}` (95 %)", "seeds"]
    return _markdown(head, rows)


def rate_table(study: Study, results: dict, task: str) -> str:
    """Lists tuning losses by learning rate, the smallest in bold."""
    rows, rates = [], study.task(task).learning_rates
    for arm in study.arms:
        if arm.rate_of is not None:
            continue
        cells = analyse.select(results, task=task, arm=arm.name, is_tuning=True)
        losses = [cells[rate]["test_loss"] if rate in cells else None for rate in rates]
        known = [loss for loss in losses if loss is not None]
        shown = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        shown = [
            f"**{text}**" if loss is not None and loss == min(known) else text
            for text, loss in zip(shown, losses, strict=True)
        ]
        rows.append([f"`{arm.name}`", *shown])
    return _markdown(["arm", *[f"{rate:g}" for rate in rates]], rows)


def rank_table(study: Study, results: dict, task: str) -> str:
    """Lists how final ranks correlate with the routing that MoE-Sieve's profile measured on the
    base model.
    """
    share_LE = analyse.base_shares(results, task)
    if share_LE is None:
        return ""
    rows = []
    for arm in study.arms:
        cells = analyse.select(results, task=task, arm=arm.name)
        if not cells:
            continue
        ranks = np.array([cell["ranks"] for cell in cells.values()], np.float64)
        shares = np.broadcast_to(share_LE, ranks.shape)
        related = analyse.relation(ranks, shares)
        met = [analyse.effective_rank(each, share_LE) for each in ranks]
        layers = " ".join(f"{value:+.2f}" for value in related.layers)
        spread = ranks.std(axis=2).mean()
        rows.append(
            [
                f"`{arm.name}`",
                f"{ranks.sum(axis=2).mean():g}",
                f"{ranks.min():g} to {ranks.max():g}",
                f"{spread:.1f}",
                f"{statistics.mean(met):.1f}",
                f"{related.correlation:+.2f} ({layers})",
            ]
        )
    head = ["arm", "ranks per layer", "range", "sd within a layer", "mean rank per assignment"]
    return _markdown([*head, "r(rank, use), by layer"], rows)


def config_table(study: Study, results: dict) -> str:
    """Lists how the stored configs of the arms differ from the study's base config, except rates
    and paths; a field that differs only in some tasks is named with them.
    """
    rows = []
    for arm in study.arms:
        found: dict[str, set] = {}
        for cell in results["cells"]:
            if cell["arm"] == arm.name:
                for name, value in cell["changes"].items():
                    if name != "train.learning_rate":
                        found.setdefault(f"`{name}={value}`", set()).add(cell["task"])
        names = [
            text if len(tasks) == len(study.tasks) else f"{text} ({', '.join(sorted(tasks))})"
            for text, tasks in sorted(found.items())
        ]
        rows.append([f"`{arm.name}`", ", ".join(names) or "none"])
    return _markdown(["arm", "fields that differ from the base config"], rows)


def information_table(study: Study, results: dict) -> str:
    """Lists by layer what a token's expert tells about its domain in the base model, and how
    unevenly experts are used.
    """
    loads = [values["load"] for values in read_json(BUNDLED / "pretrain.json")["heldout"].values()]
    load_DLE = np.array(loads)
    columns = [
        [f"{mutual_information(load_DLE[:, layer]):.2f}" for layer in range(load_DLE.shape[1])]
    ]
    head = ["layer", "I(domain; expert), nats"]
    for task in study.tasks:
        share_LE = analyse.base_shares(results, task.name)
        cells = analyse.select(results, task=task.name, arm="dr_lora")
        if share_LE is None or not cells:
            continue
        ranks = np.array([cell["ranks"] for cell in cells.values()], np.float64)
        head += [f"{task.name}: sd of use", f"{task.name}: sd of ranks"]
        columns.append([f"{value:.3f}" for value in share_LE.std(axis=1)])
        columns.append([f"{value:.1f}" for value in ranks.std(axis=2).mean(axis=0)])
    rows = [[str(layer), *row] for layer, row in enumerate(zip(*columns, strict=True))]
    return _markdown(head, rows)


CONTRASTS = (  # question, arm, minus
    ("growth by saliency against growth at random", "dr_lora", "random"),
    ("growth by saliency against its own final ranks from step 1", "dr_lora", "frozen_final"),
    ("its final ranks from step 1 against uniform ranks", "frozen_final", "lora_r16"),
    ("growth at random against uniform ranks", "random", "lora_r16"),
    ("growth by saliency against the static quarter", "dr_lora", "moe_sieve"),
    ("growth that ends after a quarter of the steps", "early_end", "dr_lora"),
    ("Adam that counts by rank", "rank_adam", "dr_lora"),
    ("importance of the next rank", "probe", "dr_lora"),
    ("twice the budget against the budget", "lora_r32", "lora_r16"),
)


def contrast_table(study: Study, results: dict) -> str:
    rows = []
    for question, arm, other in CONTRASTS:
        found = [analyse.compare(results, task.name, other, arm) for task in study.tasks]
        rows.append([f"{question}: `{arm}` - `{other}`", *map(_difference, found)])
    return _markdown(["question", *[task.name for task in study.tasks]], rows)


def cost_table(study: Study, results: dict) -> str:
    """Lists tokens per second of an arm as a ratio to the reference, paired by seed and task."""
    rows = []
    for arm in study.arms:
        ratios, peaks = [], []
        for task in study.tasks:
            mine = analyse.select(results, task=task.name, arm=arm.name)
            theirs = analyse.select(results, task=task.name, arm=study.reference)
            for seed in mine.keys() & theirs.keys():
                pair = mine[seed], theirs[seed]
                ratios.append(pair[1]["tokens_per_second"] / pair[0]["tokens_per_second"])
                peaks.append(pair[0]["peak_memory"] / pair[1]["peak_memory"])
        if ratios:
            low, high = np.quantile(ratios, [0.25, 0.75])
            rows.append(
                [
                    f"`{arm.name}`",
                    f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})",
                    f"{statistics.median(peaks):.3f}",
                    str(len(ratios)),
                ]
            )
    head = ["arm", f"time per token over `{study.reference}` (quartiles)", "peak memory over it"]
    return _markdown([*head, "pairs"], rows)


if __name__ == "__main__":
    main()
