"""Draws the ranks of a run as they grow, for the README: docs/images/ranks.png.

    python -m drlora_jax.train --config configs/tiny.py
    python tools/make_images.py --run runs/tiny

Needs matplotlib (`pip install -e ".[experiments]"`) and only the run's `ranks.jsonl` and
`metrics.jsonl`.
"""

import argparse
import json
import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be set first)
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402

from drlora_jax.reporting.palette import ANCHORS, ink  # noqa: E402

PANELS = 5  # rank maps, evenly spaced over the events
COLOURS = LinearSegmentedColormap.from_list("ranks", [tuple(c / 255 for c in a) for a in ANCHORS])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--out", default="docs/images/ranks.png", metavar="FILE.png")
    args = parser.parse_args()
    events, losses = read_events(args.run), read_losses(args.run)
    draw(events, losses).savefig(args.out, dpi=160, facecolor="white")
    print(f"{args.out}: {pathlib.Path(args.out).stat().st_size / 1e3:.0f} kB")


def read_events(run: pathlib.Path) -> list[tuple[int, np.ndarray]]:
    """Returns the ranks [L, E] before step 1 and after every event, by step."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    rows = [json.loads(line) for line in (run / "ranks.jsonl").read_text().splitlines()]
    first = np.full_like(np.array(rows[0]["ranks"]), config["allocation"]["r_init"])
    return [(0, first), *((row["step"], np.array(row["ranks"])) for row in rows)]


def read_losses(run: pathlib.Path) -> list[tuple[int, float]]:
    """Returns the held-out loss wherever it was measured, by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]


def draw(events: list[tuple[int, np.ndarray]], losses: list[tuple[int, float]]) -> plt.Figure:
    """Draws rank maps from the start to the last event, above the mean rank and the held-out
    loss.
    """
    shown = [events[round(at)] for at in np.linspace(0, len(events) - 1, PANELS)]
    every = np.stack([ranks_LE for _, ranks_LE in events])
    low, high = every.min(), every.max()
    figure = plt.figure(figsize=(12, 3.9), layout="constrained")
    maps, curves = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    for column, (axes, (step, ranks_LE)) in enumerate(
        zip(maps.subplots(1, PANELS), shown, strict=True)
    ):
        draw_map(axes, ranks_LE, low, high)
        title = "start" if step == 0 else f"after step {step}"
        axes.set_title(f"{title}: mean rank {ranks_LE.mean():.1f}", fontsize=10)
        axes.set_xlabel("expert", fontsize=9)
        axes.set_ylabel("layer" if column == 0 else "", fontsize=9)
    ranks_axes, loss_axes = curves.subplots(1, 2)
    draw_growth(ranks_axes, events)
    loss_axes.plot(*zip(*losses, strict=True), marker="o", color=COLOURS(0.35))
    loss_axes.set_title("held-out loss, nats per token", fontsize=10)
    loss_axes.set_xlabel("step", fontsize=9)
    for axes in (ranks_axes, loss_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def draw_map(axes, ranks_LE: np.ndarray, low: int, high: int) -> None:
    """Draws one map of layers x experts, with the ranks as numbers."""
    axes.imshow(ranks_LE, cmap=COLOURS, vmin=low, vmax=high, aspect="auto")
    for (layer, expert), rank in np.ndenumerate(ranks_LE):
        colour = ink((rank - low) / max(high - low, 1))
        axes.text(expert, layer, str(rank), ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(ranks_LE.shape[1]))
    axes.set_yticks(range(ranks_LE.shape[0]))
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def draw_growth(axes, events: list[tuple[int, np.ndarray]]) -> None:
    """Draws the rank of every expert over the run, and their mean."""
    steps = [step for step, _ in events]
    ranks = np.stack([ranks_LE.reshape(-1) for _, ranks_LE in events])
    axes.step(steps, ranks, where="post", color=COLOURS(0.35), alpha=0.25, linewidth=1)
    axes.step(steps, ranks.mean(axis=1), where="post", color=COLOURS(0.1), linewidth=2.5)
    axes.set_title("rank of every expert, and their mean", fontsize=10)
    axes.set_xlabel("step", fontsize=9)


if __name__ == "__main__":
    main()
