"""Writes the tables of a report: final figures, evaluation, config and provenance."""

import html
import json
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from drlora_jax.config import TrainConfig, to_dict
from drlora_jax.config.flat import flat
from drlora_jax.reporting.charts import number
from drlora_jax.reporting.read import (
    RunLog,
    budgets,
    curve,
    frames,
    is_number,
    last_step,
    total_steps,
)
from drlora_jax.system.text import format_bytes


class Figure(NamedTuple):
    """A final figure of a run, and its explanation."""

    value: str
    detail: str = ""


def figures(run: RunLog) -> dict[str, Figure]:
    """Returns the final figures by name; what was not logged is left out."""
    makers: dict[str, Callable[[RunLog], Figure | None]] = {
        "Steps": _steps,
        "Held-out loss": _eval_loss,
        "Training loss": _loss,
        "Mean active rank": _ranks,
        "Speed": _speed,
        "Peak memory": _memory,
    }
    made = {name: maker(run) for name, maker in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def _steps(run: RunLog) -> Figure:
    tokens, total = curve(run, "tokens"), total_steps(run)
    parts = [f"of {total:,}"] if total else []
    parts += [f"{number(tokens[-1][1])} tokens"] if tokens else []
    return Figure(f"{last_step(run):,}", ", ".join(parts))


def _eval_loss(run: RunLog) -> Figure | None:
    losses = curve(run, "eval_loss")
    if not losses:
        return None
    best_step, best = min(losses, key=lambda point: point[1])
    lowest = "lowest" if best == losses[-1][1] else f"lowest {best:.4f} at step {best_step:,}"
    return Figure(f"{losses[-1][1]:.4f}", f"{lowest}, first {losses[0][1]:.4f}, nats per token")


def _loss(run: RunLog) -> Figure | None:
    losses = [value for _, value in curve(run, "loss")]
    if not losses:
        return None
    tail = losses[-max(len(losses) // 10, 1) :]
    rows = f"mean of the last {len(tail)} logged steps" if len(tail) > 1 else "last logged step"
    return Figure(f"{statistics.fmean(tail):.4f}", f"{rows}, nats per token")


def _ranks(run: RunLog) -> Figure | None:
    found = frames(run, "ranks")
    ranks = [value for row in found[-1].values for value in row] if found else []
    if not ranks:
        return None
    limits, experts = budgets(run, len(found[-1].values)), len(found[-1].values[0])
    of = f", budget {statistics.fmean(limits) / experts:.4g}" if limits and experts else ""
    return Figure(f"{statistics.fmean(ranks):.2f}", f"min {min(ranks)}, max {max(ranks)}{of}")


def _speed(run: RunLog) -> Figure | None:
    rates = [value for _, value in curve(run, "tokens_per_second")]
    if not rates:
        return None
    mfu = [value for _, value in curve(run, "mfu")]
    used = f", MFU {statistics.median(mfu):.1%}" if mfu else ""
    return Figure(f"{statistics.median(rates):,.0f}", f"tokens per second, median{used}")


def _memory(run: RunLog) -> Figure | None:
    host = [value for _, value in curve(run, "host_peak_bytes")]
    device = [value for _, value in curve(run, "device_peak_bytes")]
    if device:
        rest = f"fullest device; host {format_bytes(max(host))}" if host else "fullest device"
        return Figure(format_bytes(max(device)), rest)
    return Figure(format_bytes(max(host)), "host process") if host else None


def tiles(run: RunLog) -> str:
    parts = [
        f'<div class="tile"><h3>{html.escape(name)}</h3><p class="value">'
        f'{html.escape(figure.value)}</p><p class="quiet">{html.escape(figure.detail)}</p></div>'
        for name, figure in figures(run).items()
    ]
    return f'<div class="tiles">{"".join(parts)}</div>'


def figures_table(runs: list[RunLog], names: list[str]) -> str:
    """Returns final figures side by side, one column per run."""
    found = [figures(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for each in found for name in each):
        cells = [
            f'{html.escape(each[name].value)}<br><span class="quiet">'
            f"{html.escape(each[name].detail)}</span>"
            if name in each
            else "–"
            for each in found
        ]
        rows.append([html.escape(name), *cells])
    return table(["", *map(_run_head, range(len(runs)), names)], rows, "figures")


def _run_head(index: int, name: str) -> str:
    return f'<span class="key run{index % 6}"></span>{html.escape(name)}'


def evaluation_table(runs: list[RunLog], names: list[str]) -> str:
    """Returns the rows of eval.json with their 95 % intervals; empty if there are none."""
    rows = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        for row in run.evaluations:
            cells = [_text(row.get("task")), _text(row.get("metric")), f"{row['value']:.4f}"]
            step = "base" if "step" in row and row["step"] is None else _text(row.get("step"))
            cells += [_interval(row), _text(row.get("n")), step]
            rows.append(([_run_head(index, name)] if len(runs) > 1 else []) + cells)
    head = ["task", "metric", "value", "95 % interval", "n", "step"]
    return table((["run"] if len(runs) > 1 else []) + head, rows, "evaluation") if rows else ""


def _interval(row: dict) -> str:
    """Returns the interval as measured, or from the standard error."""
    ends, error = row.get("ci95"), row.get("stderr")
    if not (isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends))):
        if not is_number(error):
            return "–"
        ends = [row["value"] - 1.96 * error, row["value"] + 1.96 * error]
    return f"{ends[0]:.4f} to {ends[1]:.4f}"


def config_differences(runs: list[RunLog], names: list[str]) -> str:
    """Lists the fields of one run that differ from the defaults, or the fields in which several
    runs differ.
    """
    defaults = flat(to_dict(TrainConfig()))
    rows = []
    for name in dict.fromkeys([*defaults, *(each for run in runs for each in run.config)]):
        values = [run.config.get(name, defaults.get(name)) for run in runs]
        shown = [
            _text(value) for value in ([defaults.get(name)] if len(runs) == 1 else []) + values
        ]
        if name != "run.dir" and len(set(shown)) > 1:
            rows.append([f"<code>{html.escape(name)}</code>", *shown])
    if not rows:
        return '<p class="quiet">No difference.</p>'
    heads = ["default", "this run"] if len(runs) == 1 else map(_run_head, range(len(runs)), names)
    return table(["field", *heads], rows, "config")


def full_config(run: RunLog) -> str:
    rows = [[f"<code>{html.escape(name)}</code>", _text(v)] for name, v in run.config.items()]
    return table(["field", "value"], rows, "config")


def provenance(runs: list[RunLog], names: list[str]) -> str:
    """Returns versions, devices and fingerprints, one column per run."""
    found = [_facts(run) for run in runs]
    rows = [
        [html.escape(name), *(_text(each.get(name)) for each in found)]
        for name in dict.fromkeys(name for each in found for name in each)
    ]
    heads = ["this run"] if len(runs) == 1 else list(map(_run_head, range(len(runs)), names))
    return table(["", *heads], rows, "config")


def _facts(run: RunLog) -> dict[str, Any]:
    versions, devices = run.facts.get("versions"), run.facts.get("devices")
    facts = {"drlora_jax": run.facts.get("version")}
    facts |= versions if isinstance(versions, dict) else {}
    if isinstance(devices, dict):
        mesh = devices.get("mesh") if isinstance(devices.get("mesh"), dict) else {}
        facts["devices"] = f"{devices.get('count')} x {devices.get('kind')}"
        facts["mesh"] = " x ".join(f"{axis}={size}" for axis, size in mesh.items())
        facts["processes"] = devices.get("processes")
    for name, key in (("base", "base_fingerprint"), ("data", "data_fingerprint")):
        facts[f"{name}, sha256"] = str(run.facts.get(key) or "–")[:16]
    return facts


def _text(value) -> str:
    """Returns a JSON value as escaped text; lists and tuples look alike."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "–"
    if value is None or value == "":
        return "–"
    return html.escape(value if isinstance(value, str) else json.dumps(value))


def table(head: list[str], rows: list[list[str]], kind: str) -> str:
    """Returns a table of cells that are already HTML."""
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
