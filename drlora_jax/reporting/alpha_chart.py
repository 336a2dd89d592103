"""Draws AlphaLoRA's allocation as an SVG file: the layers' exponents above, their experts below."""

import html
from collections.abc import Sequence

from drlora_jax.reporting.charts import Axis, distinct_labels, nice_ticks
from drlora_jax.reporting.palette import shade

WIDTH, PANEL = 640, 150  # pixels
LEFT, RIGHT, TOP, GAP, BOTTOM = 46, 12, 30, 34, 36
HEIGHT = TOP + 2 * PANEL + GAP + BOTTOM
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.end{text-anchor:end}.mid{text-anchor:middle}"
    "line{stroke:#ddd}path{fill:none;stroke-width:2}"
)
COLOUR = shade(0.4)


def draw_layers(alpha_L: Sequence[float], experts_L: Sequence[int], *, title: str) -> str:
    """Returns the SVG file as text.

    Args:
      title: any text, such as the name of the model.
    """
    x = Axis(-0.5, len(alpha_L) - 0.5, LEFT, WIDTH - RIGHT)
    middle = TOP + PANEL
    margin = 0.08 * (max(alpha_L) - min(alpha_L)) or 0.1
    upper = Axis(min(alpha_L) - margin, max(alpha_L) + margin, middle, TOP)
    lower = Axis(0, max([*experts_L, 1]) * 1.05, middle + GAP + PANEL, middle + GAP)
    points = [(x.place(i), upper.place(alpha)) for i, alpha in enumerate(alpha_L)]
    body = [*_scale(upper, "alpha, mean of the layer's matrices"), *_scale(lower, "experts")]
    path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
    body.append(f'<path d="M{path}" stroke="{COLOUR}"/>')
    body += [
        f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{COLOUR}"/>' for left, top in points
    ]
    width = 0.7 * (x.stop - x.start) / len(alpha_L)
    for index, count in enumerate(experts_L):
        top = lower.place(max(count, 0))
        body.append(
            f'<rect x="{x.place(index) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{lower.start - top:.1f}" fill="{COLOUR}"/>'
        )
    for layer in nice_ticks(0, max(len(alpha_L) - 1, 1), 16):
        if layer == int(layer) and layer < len(alpha_L):
            body.append(_text(x.place(layer), lower.start + 16, f"{layer:.0f}", "mid"))
    body.append(_text((x.start + x.stop) / 2, HEIGHT - 6, "layer", "mid"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img"><title>{html.escape(title)}</title>'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
        f"{''.join(body)}</svg>\n"
    )


def _scale(y: Axis, label: str) -> list[str]:
    """Draws horizontal lines at round values, with their numbers and unit."""
    ticks = nice_ticks(y.low, y.high, 4)
    parts = [_text(LEFT, y.stop - 8, label, "")]
    for value, name in zip(ticks, distinct_labels(ticks), strict=True):
        top = y.place(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(_text(LEFT - 6, top + 4, name, "end"))
    return parts


def _text(left: float, top: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{left:.1f}" y="{top:.1f}">{html.escape(text)}</text>'
