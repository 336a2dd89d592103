"""Writes the report: one self-contained HTML file about one run, or several side by side.

It opens without a network: style, script and data are inline, and its content security policy
forbids everything else. All text from files is escaped; the data is JSON without any `<`.
"""

import base64
import hashlib
import html
import json
import pathlib
import statistics
from collections.abc import Callable

from drlora_jax.reporting import maps, tables
from drlora_jax.reporting.charts import Chart, Series, draw
from drlora_jax.reporting.read import RunLog, budgets, curve, frames, read_run, total_steps
from drlora_jax.system.paths import replace_text
from drlora_jax.system.text import counted

FOLDER = pathlib.Path(__file__).parent
GIB = 2.0**30


def write_report(directories: list[pathlib.Path], out: pathlib.Path) -> None:
    """Reads the runs and replaces the page as a whole: readers never see half of it."""
    page = make_page([read_run(directory) for directory in directories])
    # A name may have bytes that are not UTF-8; the page shows a question mark for them.
    replace_text(out, page, errors="replace")


def make_page(runs: list[RunLog]) -> str:
    names = distinct_names(runs)
    title = " / ".join(names)
    heat_maps = _maps(runs, names)
    steps = sorted({frame.step for each in heat_maps for frame in each.frames})
    data = {"palette": maps.PALETTE, "steps": steps, "maps": list(map(maps.as_data, heat_maps))}
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [
        _head(runs, names),
        tables.tiles(runs[0]) if len(runs) == 1 else tables.figures_table(runs, names),
        _section("Learning", _charts(_learning(runs, names), runs, names)),
        _section("Capacity", _capacity(runs, heat_maps, steps)),
        _section("Evaluation", tables.evaluation_table(runs, names)),
        _section(
            "Rate, memory and schedule", _charts(_machine(runs, names), runs, names, "compact")
        ),
        f'<div class="columns">{_config(runs, names)}'
        f"{_section('Made with', tables.provenance(runs, names))}</div>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + f'\n</main>\n<script type="application/json" id="data">{as_json(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def as_json(value) -> str:
    """Returns JSON that cannot end a script element or start a comment."""
    text = json.dumps(value, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def distinct_names(runs: list[RunLog]) -> list[str]:
    """Returns the names of run directories; paths where two have the same name."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else str(run.directory.absolute()) for run in runs
    ]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _head(runs: list[RunLog], names: list[str]) -> str:
    if len(runs) > 1:
        return f"<header><h1>{len(runs)} runs compared</h1></header>"
    run, config = runs[0], runs[0].config
    what = [config.get(key) for key in ("model.path", "adapter.kind", "allocation.kind")]
    parts = [html.escape(str(each)) for each in what if each]
    parts += [f"last logged {run.last_logged}"] if run.last_logged else []
    if run.skipped_lines:
        parts.append(f"{counted(run.skipped_lines, 'log line')} could not be read")
    return (
        f'<header><h1>{html.escape(names[0])}</h1><p class="quiet">{" · ".join(parts)}</p></header>'
    )


# ------------------------------------------------------------------------------------------- curves


def _learning(runs: list[RunLog], names: list[str]) -> list[Chart]:
    events = [row["step"] for row in runs[0].events] if len(runs) == 1 else []
    end = _end(runs)
    nats = "nats per token"
    return [
        Chart("Training loss", nats, _all(runs, names, "loss"), is_noisy=True, end=end),
        Chart("Held-out loss", nats, _heldout(runs, names), ticks_at=events, end=end),
        Chart(
            "Mean active rank", "ranks", _mean_ranks(runs, names), True, is_stepped=True, end=end
        ),
    ]


def _machine(runs: list[RunLog], names: list[str]) -> list[Chart]:
    def percent(value):
        return 100 * value

    def gibibytes(value):
        return value / GIB

    speed, end = _all(runs, names, "tokens_per_second"), _end(runs)
    host = _all(runs, names, "host_peak_bytes", gibibytes)
    device = _all(runs, names, "device_peak_bytes", gibibytes)
    rate, norm = _all(runs, names, "learning_rate"), _all(runs, names, "grad_norm")
    zero = {"from_zero": True, "end": end, "is_compact": True}
    return [
        Chart("Speed", "tokens per second", speed, is_noisy=True, **zero),
        Chart("MFU", "% of peak", _all(runs, names, "mfu", percent), is_noisy=True, **zero),
        Chart("Peak host memory", "GiB", host, **zero),
        Chart("Peak device memory", "GiB", device, **zero),
        Chart("Gradient norm", "unclipped", norm, is_noisy=True, **zero),
        Chart("Learning rate", "", rate, **zero),
    ]


def _end(runs: list[RunLog]) -> float:
    return max((total_steps(run) or 0 for run in runs), default=0)


def _all(
    runs: list[RunLog], names: list[str], key: str, convert: Callable[[float], float] = float
) -> list[Series]:
    return [
        Series(name, index, [(step, convert(value)) for step, value in curve(run, key)])
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def _heldout(runs: list[RunLog], names: list[str]) -> list[Series]:
    """Returns the held-out loss; for pretraining, one line per domain."""
    series = _all(runs, names, "eval_loss")
    for run, name in zip(runs, names, strict=True):
        rows = [row for row in run.metrics if isinstance(row.get("heldout"), dict)]
        for domain in dict.fromkeys(domain for row in rows for domain in row["heldout"]):
            inner = run._replace(metrics=[{**r["heldout"], "step": r["step"]} for r in rows])
            label = f"{name}, {domain}" if len(runs) > 1 else str(domain)
            series.append(Series(label, len(series) - 1, curve(inner, domain)))
    return series


def _mean_ranks(runs: list[RunLog], names: list[str]) -> list[Series]:
    """Returns the mean active rank of all experts, constant between events, and the budget,
    dashed.
    """
    series = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = []
        for step, values in frames(run, "ranks"):
            ranks = [value for row in values for value in row]
            points.append((step, sum(ranks) / max(len(ranks), 1)))
        if not points:
            continue
        last = max([points[-1][0], *(row["step"] for row in run.metrics)])
        series.append(Series(name, index, [*points, (last, points[-1][1])]))
        values = frames(run, "ranks")[-1].values
        limits, experts = budgets(run, len(values)), len(values[0])
        if limits and experts and len(runs) == 1:
            height = statistics.fmean(limits) / experts
            line = [(0, height), (max(last, total_steps(run) or 0), height)]
            series.append(Series("budget", index, line, is_dashed=True))
    return series


def _charts(charts: list[Chart], runs: list[RunLog], names: list[str], kind: str = "") -> str:
    drawn = "".join(filter(None, map(draw, charts)))
    legend = ""
    if len(runs) > 1 and drawn:
        keys = "".join(
            f'<span><span class="key run{index % 6}"></span>{html.escape(name)}</span>'
            for index, name in enumerate(names)
        )
        legend = f'<p class="legend">{keys}</p>'
    return f'{legend}<div class="charts {kind}">{drawn}</div>' if drawn else ""


# ------------------------------------------------------------------------------ capacity and config


def _maps(runs: list[RunLog], names: list[str]) -> list[maps.HeatMap]:
    """Returns the rank maps of all runs on one colour scale; for a single run also saliency and
    routing.
    """
    high = max(map(maps.highest_rank, runs))
    if len(runs) == 1:
        ranks = [maps.rank_map(runs[0], "Active ranks", high)]
        found = [*ranks, *maps.more_maps(runs[0])]
    else:
        pairs = zip(runs, names, strict=True)
        found = [maps.rank_map(run, f"Active ranks, {name}", high) for run, name in pairs]
    return [each for each in found if each is not None]


def _capacity(runs: list[RunLog], heat_maps: list[maps.HeatMap], steps: list[int]) -> str:
    if not heat_maps:
        return ""
    last = len(steps) - 1
    slider = (
        '<div class="slider"><button type="button" id="play" aria-label="play">▶</button>'
        f'<input type="range" id="step" min="0" max="{last}" value="{last}" aria-label="step">'
        f'<output id="at">after step {steps[-1]}</output></div>'
    )
    drawn = "".join(maps.draw(each, index) for index, each in enumerate(heat_maps))
    numbers = maps.rank_table(runs[0]) if len(runs) == 1 else ""
    note = '<p class="quiet">Rows are layers, columns are experts. The slider selects a step.</p>'
    return f'{note}{slider if last else ""}<div class="maps">{drawn}</div>{numbers}'


def _config(runs: list[RunLog], names: list[str]) -> str:
    content = tables.config_differences(runs, names)
    if len(runs) > 1:
        return _section("Config, where the runs differ", content)
    every = f"<details><summary>Every field</summary>{tables.full_config(runs[0])}</details>"
    return _section("Config, where it differs from the defaults", content + every)
