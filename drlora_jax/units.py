"""Numbers as people read them."""


def format_bytes(count: float) -> str:
    """Bytes in the largest unit below 1024 of it, up to GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.2f} GiB"
