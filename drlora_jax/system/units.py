"""Numbers as people read them."""


def counted(number: int | str, one: str, many: str = "") -> str:
    """The number with its noun: 1 row, 2 rows; a number that is text stands as it is written.

    Args:
      many: the plural, where it is not `one` with an s.
    """
    return f"{number} {one if str(number) == '1' else many or one + 's'}"


def format_bytes(count: float) -> str:
    """Bytes in the largest unit below 1024 of it, up to GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.2f} GiB"
