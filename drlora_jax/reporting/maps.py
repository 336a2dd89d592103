"""Builds maps of layers x experts (ranks, saliency, routing) for the script of the page, and the
table of the last ranks.
"""

import contextlib
import html
from typing import NamedTuple

from drlora_jax.config import from_flat
from drlora_jax.errors import UserError
from drlora_jax.reporting.palette import shade
from drlora_jax.reporting.read import Frame, RunLog, budgets, frames, is_matrix, layer_indices

MOST_CELLS = 400_000  # of one map over all its steps; beyond that, frames are dropped evenly
PALETTE = [shade(index / 63) for index in range(64)]
GRADIENT = ",".join(shade(index / 8) for index in range(9))


class HeatMap(NamedTuple):
    """One map over time."""

    title: str
    unit: str  # of a value, for the tooltip
    layers: list[int]
    frames: list[Frame]
    high: float  # end of the colour scale, which begins at 0
    scale: float = 1.0  # factor from logged to shown values
    decimals: int = 0  # of shown values
    left_out: int = 0  # steps without a frame


def rank_map(run: RunLog, title: str, high: float | None = None) -> HeatMap | None:
    """Returns the map of active ranks; `high` aligns the colour scales of several runs."""
    return _heat_map(run, title, "ranks", frames(run, "ranks"), high or highest_rank(run))


def more_maps(run: RunLog) -> list[HeatMap]:
    """Returns the maps of saliency, routing, and ranks of matrices outside the routed experts."""
    shares = [
        Frame(step, [_shares(row) for row in values]) for step, values in frames(run, "saliency")
    ]
    maps = [
        _heat_map(run, "Saliency", "% of its layer", shares, None, 100, 1),
        _heat_map(run, "Routing load", "% of choices", frames(run, "routing_load"), None, 100, 1),
        _heat_map(run, "Combine weight", "per token", frames(run, "routing_weight"), None, 1, 2),
    ]
    names = sorted({name for row in run.events for name in _groups(row)})
    for name in names:
        found = [
            Frame(row["step"], _groups(row)[name]) for row in run.events if name in _groups(row)
        ]
        maps.append(_heat_map(run, f"Active ranks: {name}", "ranks", found))
    return [each for each in maps if each is not None]


def _heat_map(
    run: RunLog, title: str, unit: str, found: list[Frame], high=None, scale=1.0, decimals=0
) -> HeatMap | None:
    if not found:
        return None
    cells = sum(map(len, found[-1].values)) or 1
    kept = thin_frames(found, max(MOST_CELLS // cells, 2))
    if high is None:
        high = scale_end([value for frame in kept for row in frame.values for value in row], cells)
    layers = layer_indices(run, len(found[-1].values))
    return HeatMap(title, unit, layers, kept, high or 1.0, scale, decimals, len(found) - len(kept))


def thin_frames(found: list[Frame], most: int) -> list[Frame]:
    """Keeps at most `most` (two or more) frames, evenly spaced, including both ends."""
    if len(found) <= most:
        return found
    picks = {round(index * (len(found) - 1) / (most - 1)) for index in range(most)}
    return [found[index] for index in sorted(picks)]


def scale_end(values: list[float], cells: int) -> float:
    """Returns the highest value; for large maps the 99th percentile, since a few extreme cells
    would leave no colours for the rest.
    """
    ordered = sorted(values)
    return ordered[int((1.0 if cells <= 200 else 0.99) * (len(ordered) - 1))] if ordered else 0.0


def highest_rank(run: RunLog) -> float:
    """Returns the largest rank that an expert can have: as recorded, as configured, or as seen."""
    known = run.facts.get("max_rank")
    if known is None:  # an older run
        with contextlib.suppress(UserError):
            config = from_flat(run.config)
            known = config.allocation.own.allocated_rank(config.allocation, config.adapter)
    seen = [value for frame in frames(run, "ranks") for row in frame.values for value in row]
    return max([known if isinstance(known, int) else 0, *seen])


def _shares(row: list[float]) -> list[float]:
    total = sum(row)
    return [float(f"{value / total:.4g}") if total else 0.0 for value in row]


def _groups(row: dict) -> dict:
    groups = row.get("groups")
    groups = groups if isinstance(groups, dict) else {}
    return {name: value for name, value in groups.items() if is_matrix(value)}


def as_data(heat_map: HeatMap) -> dict:
    """Returns steps and values as logged, for the script."""
    return {
        "unit": heat_map.unit,
        "layers": heat_map.layers,
        "high": heat_map.high,
        "scale": heat_map.scale,
        "decimals": heat_map.decimals,
        "frames": [[frame.step, frame.values] for frame in heat_map.frames],
    }


def draw(heat_map: HeatMap, index: int) -> str:
    """Draws the placeholder of a map on the page, with its colour scale."""
    values = (value for _, rows in heat_map.frames for row in rows for value in row)
    highest = max(values, default=0.0)
    top = "≥ " if highest > heat_map.high else ""
    top += f"{heat_map.high * heat_map.scale:.{heat_map.decimals}f}"
    left_out = ""
    if heat_map.left_out:
        shown, every = len(heat_map.frames), len(heat_map.frames) + heat_map.left_out
        left_out = f'<p class="quiet">This page has {shown} of {every} steps.</p>'
    is_wide = " wide" if max(map(len, heat_map.frames[-1].values)) > 24 else ""
    return (
        f'<figure class="map{is_wide}"><figcaption><span>{html.escape(heat_map.title)}</span>'
        f'<span class="unit">0<span class="scale" style="background:linear-gradient(to right,'
        f'{GRADIENT})"></span>{top} {html.escape(heat_map.unit)}</span></figcaption>'
        f'<canvas data-map="{index}" role="img" aria-label="{html.escape(heat_map.title)} by layer '
        f'(rows) and expert (columns)"></canvas>{left_out}</figure>'
    )


def rank_table(run: RunLog) -> str:
    """Returns the last ranks as numbers, with the sum of every layer and its budget."""
    found = frames(run, "ranks")
    if not found:
        return ""
    step, values = found[-1]
    limits, layers = budgets(run, len(values)), layer_indices(run, len(values))
    experts = range(max(map(len, values)))
    head = "".join(f"<th>{index}</th>" for index in experts)
    rows = []
    for index, (layer, row) in enumerate(zip(layers, values, strict=True)):
        cells = "".join(f"<td>{value}</td>" for value in row)
        cells += "<td></td>" * (len(experts) - len(row))
        of = f" of {limits[index]}" if limits else ""
        rows.append(f'<tr><th>{layer}</th>{cells}<td class="sum">{sum(row)}{of}</td></tr>')
    return (
        f"<details><summary>Ranks after step {step} as a table</summary>"
        f'<div class="scroll"><table class="ranks"><thead><tr><th>layer</th>{head}'
        f"<th>sum</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )
