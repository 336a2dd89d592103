"""Formats numbers, names and errors for people."""

import difflib
from collections.abc import Callable, Iterable

NEAR = 0.6  # similarity, from 0 to 1, above which one name may be a typo of the other


def counted(number: int | str, one: str, many: str = "") -> str:
    """Returns the number with its noun: 1 row, 2 rows; a number given as text stays as written.

    Args:
      many: the plural, where it is not `one` with an s.
    """
    return f"{number} {one if str(number) == '1' else many or one + 's'}"


def format_bytes(count: float) -> str:
    """Formats bytes in the largest unit that keeps the number above 1, up to GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.2f} GiB"


def first_line(error: object) -> str:
    """Returns the first line of an error's message; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(
    name: str, known: Iterable[str], *, count: int = 1, show: Callable[[str], object] = str
) -> str:
    """Returns `did you mean X?` with the nearest known names; "" if none is near.

    Args:
      count: the largest number of names.
      show: formats a known name, for example as a path.
    """
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=NEAR)
    return f"did you mean {' or '.join(str(show(each)) for each in near)}?" if near else ""
