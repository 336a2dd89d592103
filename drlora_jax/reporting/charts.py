"""Draws line charts as inline SVG. The script of the page adds tooltips; the charts are complete
without it.
"""

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 400, 230
COMPACT_WIDTH, COMPACT_HEIGHT = 290, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MOST_POINTS = 600  # per curve; the extremes of every stretch are kept
SMOOTH_FROM = 60  # points from which a moving mean is drawn over the noise

Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    name: str
    colour: int  # number of the run; the page has a colour for each
    points: Points
    is_dashed: bool = False


class Chart(NamedTuple):
    title: str
    unit: str
    series: list[Series]
    from_zero: bool = False
    is_noisy: bool = False  # smoothed when there are many points
    is_stepped: bool = False  # values hold until the next point
    ticks_at: Sequence[float] = ()  # marked on the step axis
    end: float | None = None  # end of the step axis, including future steps
    is_compact: bool = False

    @property
    def width(self) -> int:
        return COMPACT_WIDTH if self.is_compact else WIDTH

    @property
    def height(self) -> int:
        return COMPACT_HEIGHT if self.is_compact else HEIGHT


class Axis(NamedTuple):
    low: float
    high: float
    start: float  # pixels of `low`
    stop: float  # pixels of `high`

    def place(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.stop - self.start)


def draw(chart: Chart) -> str:
    """Draws a figure with a title, the newest value and the chart; "" without points."""
    series = [each for each in chart.series if each.points]
    if not series:
        return ""
    x, y = _axes(chart, series)
    label = "optimizer step, ticks at rank events" if chart.ticks_at else "optimizer step"
    body = [*_grid(x, y, chart.height, label), _marks(chart, x, y)]
    body += [_line(chart, each, x, y) for each in series]
    title = html.escape(chart.title)
    shown = {
        "plot": [LEFT, chart.width - RIGHT, chart.width],
        "range": [x.low, x.high],
        "series": [[each.name, thin(each.points)] for each in series],
        "unit": chart.unit,
    }
    newest = ""
    if len([each for each in series if not each.is_dashed]) == 1:
        newest = f"<strong>{number(_smoothed(chart, series[0])[-1][1])}</strong> "
    return (
        f'<figure class="chart"><figcaption><span>{title}</span>'
        f'<span class="unit">{newest}{html.escape(chart.unit)}</span></figcaption>'
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{title}" '
        f'data-chart="{html.escape(json.dumps(shown, separators=(",", ":")))}">'
        f"{''.join(body)}</svg></figure>"
    )


def _axes(chart: Chart, series: list[Series]) -> tuple[Axis, Axis]:
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    low, high = min(ys), max(ys)
    if chart.from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low = low if chart.from_zero and low == 0 else low - margin
    right = max([*xs, chart.end or 0])
    return (
        Axis(0.0, right or 1.0, LEFT, chart.width - RIGHT),
        Axis(low, high + margin, chart.height - BOTTOM, TOP),
    )


def _grid(x: Axis, y: Axis, height: int, label: str) -> list[str]:
    parts = []
    ticks = nice_ticks(y.low, y.high, round((y.start - y.stop) / 40))
    for value, name in zip(ticks, distinct_labels(ticks), strict=True):
        place = y.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{x.stop}" y1="{place:.1f}" ')
        parts.append(f'y2="{place:.1f}"/><text class="y" x="{LEFT - 7}" y="{place + 3.5:.1f}">')
        parts.append(f"{name}</text>")
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{x.stop}" y1="{y.start}" y2="{y.start}"/>')
    for value in nice_ticks(x.low, x.high, round((x.stop - x.start) / 70)):
        parts.append(f'<text class="x" x="{x.place(value):.1f}" y="{y.start + 15}">')
        parts.append(f"{number(value)}</text>")
    middle = (x.start + x.stop) / 2
    parts.append(f'<text class="label" x="{middle}" y="{height - 4}">{label}</text>')
    return parts


def _marks(chart: Chart, x: Axis, y: Axis) -> str:
    bottom = y.start
    return "".join(
        f'<line class="mark" x1="{x.place(at):.1f}" x2="{x.place(at):.1f}" y1="{bottom}" '
        f'y2="{bottom - 6}"/>'
        for at in chart.ticks_at
    )


def _line(chart: Chart, series: Series, x: Axis, y: Axis) -> str:
    style = f"run{series.colour % 6}" + (" dashed" if series.is_dashed else "")
    parts = []
    smooth = _smoothed(chart, series)
    if smooth is not series.points:
        parts.append(f'<path class="line noise {style}" d="{_path(series.points, x, y)}"/>')
    path = _path(smooth, x, y, chart.is_stepped)
    parts.append(f'<path class="line {style}" d="{path}"/>')
    if series.is_dashed:
        at, value = series.points[0]
        name = html.escape(series.name)
        place = f'x="{x.place(at) + 4:.1f}" y="{y.place(value) + 13:.1f}"'
        parts.append(f"<text {place}>{name}</text>")
    if len(series.points) <= 25 and not chart.is_stepped and not series.is_dashed:
        parts += [
            f'<circle class="{style}" cx="{x.place(at):.1f}" cy="{y.place(value):.1f}" r="2.4"/>'
            for at, value in series.points
        ]
    return "".join(parts)


def _smoothed(chart: Chart, series: Series) -> Points:
    if not chart.is_noisy or len(series.points) < SMOOTH_FROM:
        return series.points
    return moving_mean(series.points, len(series.points) // 30)


def _path(points: Points, x: Axis, y: Axis, is_stepped: bool = False) -> str:
    parts = []
    for at, value in thin(points):
        left, top = f"{x.place(at):.1f}", f"{y.place(value):.1f}"
        if not parts:
            parts.append(f"M{left} {top}")
        else:
            parts.append(f"H{left}V{top}" if is_stepped else f"L{left} {top}")
    return "".join(parts)


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """Keeps at most about `most` points: the lowest and the highest of every stretch, and both
    ends.
    """
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {pick(stretch, key=lambda index: points[index][1]) for pick in (min, max)}
    return [points[index] for index in sorted(kept)]


def moving_mean(points: Points, half: int) -> Points:
    """Returns the mean over `half` points on both sides, fewer at the ends."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smooth = []
    for index, (at, _) in enumerate(points):
        start, stop = max(index - half, 0), min(index + half + 1, len(points))
        smooth.append((at, (sums[stop] - sums[start]) / (stop - start)))
    return smooth


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Returns round values in [low, high], about as many as requested."""
    rough = (high - low) / about
    if not rough > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((1, 2, 2.5, 5, 10), key=lambda each: abs(each * power - rough)) * power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def distinct_labels(ticks: Sequence[float]) -> list[str]:
    """Formats ticks with as few digits as tell them apart."""
    for digits in range(4, 16):
        labels = [number(value, digits) for value in ticks]
        if len(set(labels)) == len(labels):
            break
    return labels


def number(value: float, digits: int = 4) -> str:
    """Formats significant digits, thousands as k, M and G."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if suffix == "k" else size
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}" if value else "0"
