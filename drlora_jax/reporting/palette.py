"""The colours of ranks, shared by the terminal and the report.

Viridis: its lightness rises evenly, so the order of values is visible in grey print and with colour
blindness. Linear interpolation between nine anchors is within a few units of the original.
"""

ANCHORS = (
    (0x44, 0x01, 0x54),
    (0x47, 0x2D, 0x7B),
    (0x3B, 0x52, 0x8B),
    (0x2C, 0x72, 0x8E),
    (0x21, 0x91, 0x8C),
    (0x28, 0xAE, 0x80),
    (0x5E, 0xC9, 0x62),
    (0xAD, 0xDC, 0x30),
    (0xFD, 0xE7, 0x25),
)


def shade(fraction: float) -> str:
    """Returns the `#rrggbb` of a value between 0 (dark) and 1 (bright); values outside are
    clipped.
    """
    place = min(max(fraction, 0.0), 1.0) * (len(ANCHORS) - 1)
    below = min(int(place), len(ANCHORS) - 2)
    part = place - below
    pairs = zip(ANCHORS[below], ANCHORS[below + 1], strict=True)
    return "#" + "".join(f"{round(low + part * (high - low)):02x}" for low, high in pairs)


def ink(fraction: float) -> str:
    """Returns the `#rrggbb` of text that is legible on `shade(fraction)`."""
    return "#000000" if fraction > 0.55 else "#ffffff"
