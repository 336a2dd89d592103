"""Numbers, names and errors as people read them."""

import difflib
from collections.abc import Callable, Iterable

NEAR = 0.6  # how alike two names are, from 0 to 1, for one to be a slip for the other


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


def first_line(error: object) -> str:
    """Returns the first line of what an error says; the name of its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(
    name: str, known: Iterable[str], *, count: int = 1, show: Callable[[str], object] = str
) -> str:
    """Returns `did you mean X?` with the known names that are nearest; empty if none is near.

    Args:
      count: of names, at most.
      show: how a known name is to be written, such as a path.
    """
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=NEAR)
    return f"did you mean {' or '.join(str(show(each)) for each in near)}?" if near else ""
