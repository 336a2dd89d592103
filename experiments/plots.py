"""Plots a study as PNG files; matplotlib is imported only here, and only when a plot is drawn."""

import pathlib

import numpy as np

from experiments import analyse
from experiments.study import Study

COLOURS = (
    *("#222222", "#888888", "#0b6fb8", "#d9822b", "#2a9d5c"),
    *("#a23b72", "#5b4bb5", "#b3261e", "#17a2b8"),
)


def draw_all(study: Study, results: dict, folder: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
        | {"grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 130}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in {
        "differences": differences,
        "curves": curves,
        "ranks": ranks_and_use,
    }.items():
        figure = draw(study, results)
        figure.savefig(folder / f"{study.name}_{name}.png", bbox_inches="tight")


def _panels(count: int, height: float, width: float = 4.4):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, axes[0]


def differences(study: Study, results: dict):
    """Plots held-out loss minus the reference's: every seed, mean and 95 % interval."""
    arms = [arm for arm in study.arms if arm.name != study.reference]
    figure, axes = _panels(len(study.tasks), 0.42 * len(arms) + 1.1)
    for axis, task in zip(axes, study.tasks, strict=True):
        reference = analyse.select(results, task=task.name, arm=study.reference)
        for row, arm in enumerate(reversed(arms)):
            cells = analyse.select(results, task=task.name, arm=arm.name)
            found = analyse.compare(results, task.name, study.reference, arm.name)
            if found is None:
                continue
            colour = COLOURS[(study.arms.index(arm)) % len(COLOURS)]
            steps = [cells[s]["test_loss"] - reference[s]["test_loss"] for s in cells]
            axis.plot(steps, [row] * len(steps), "o", ms=3, color=colour, alpha=0.4)
            axis.plot([found.low, found.high], [row, row], color=colour, lw=2)
            axis.plot(found.mean, row, "D", color=colour, ms=5)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks(range(len(arms)), [arm.name for arm in reversed(arms)])
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(f"{task.name}: held-out loss minus {study.reference}")
        axis.set_xlabel("nats per token (left is better)")
    figure.tight_layout()
    return figure


def curves(study: Study, results: dict):
    """Plots mean held-out loss minus the reference's at equal tokens, along the run."""
    figure, axes = _panels(len(study.tasks), 3.0)
    for axis, task in zip(axes, study.tasks, strict=True):
        reference = analyse.select(results, task=task.name, arm=study.reference)
        for index, arm in enumerate(study.arms):
            cells = analyse.select(results, task=task.name, arm=arm.name)
            shared = sorted(cells.keys() & reference.keys())
            if not shared:
                continue
            steps = np.array([cells[s]["curve"] for s in shared])
            steps[..., 1] -= np.array([reference[s]["curve"] for s in shared])[..., 1]
            tokens, loss = steps.mean(axis=0).T
            colour = COLOURS[index % len(COLOURS)]
            axis.plot(tokens / 1000, loss, label=arm.name, color=colour, marker=".", ms=4)
        axis.set_title(f"{task.name}: held-out loss minus {study.reference}")
        axis.set_xlabel("thousand tokens")
    axes[0].set_ylabel("nats per token")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def ranks_and_use(study: Study, results: dict):
    """Plots final ranks of DR-LoRA (mean over seeds) against the base model's use of experts."""
    figure, axes = _panels(len(study.tasks), 3.0)
    for axis, task in zip(axes, study.tasks, strict=True):
        cells = analyse.select(results, task=task.name, arm="dr_lora")
        share_LE = analyse.base_shares(results, task.name)
        if not cells or share_LE is None:
            continue
        ranks_LE = np.mean([cell["ranks"] for cell in cells.values()], axis=0)
        for layer, (share_E, ranks_E) in enumerate(zip(share_LE, ranks_LE, strict=True)):
            axis.plot(share_E, ranks_E, "o", color=COLOURS[layer + 2], label=f"layer {layer}")
        axis.set_title(f"{task.name}: ranks of dr_lora")
        axis.set_xlabel("share of the layer's choices in the base")
    axes[0].set_ylabel("final active rank")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    return figure
