"""Reports how many passes a run makes over its training data, and whether its rows are longer than
the model's positions.

Packing puts several documents into a row, so the same number of steps makes more passes: a number
of steps chosen for one document per row then trains on everything several times.
"""

from drlora_jax.config import TrainSection
from drlora_jax.data.loader import Loader
from drlora_jax.system.text import counted

MANY_PASSES = 10
MANY_PER_ROW = 2  # documents


def passes_lines(loader: Loader, section: TrainSection, total_steps: int) -> list[str]:
    """Returns lines on the rows per epoch and the passes over them, with a warning where the number
    of passes is probably not intended.
    """
    documents, epoch = len(loader.documents), len(loader.epoch_rows(0))
    rows = total_steps * section.batch_size
    passes, unpacked = counted(_number(rows / epoch), "pass", "passes"), rows / documents
    kind = ("packed row",) if loader.is_packed else ("row of one document", "rows of one document")
    beside = f" ({_number(unpacked)} without packing)" if loader.is_packed else ""
    lines = [
        f"{counted(epoch, *kind)} per epoch; {counted(total_steps, 'step')} of "
        f"{counted(section.batch_size, 'row')}: {passes}{beside}"
    ]
    if rows >= MANY_PASSES * epoch and section.batch_size > epoch:
        lines.append(
            f"warning: train.batch_size={section.batch_size} is larger than the data "
            f"({counted(epoch, 'row')} per epoch), so each step repeats rows: {passes} in total; "
            "lower train.batch_size"
        )
    elif rows >= MANY_PASSES * epoch:
        lines.append(f"warning: {passes} over the training data; for one pass set train.epochs=1")
    # With train.epochs the passes are known; less than one pass repeats nothing.
    elif section.steps and rows > epoch and documents > MANY_PER_ROW * epoch:
        lines.append(
            f"warning: packing puts {documents / epoch:.1f} documents into a row, so the run makes "
            f"{passes} instead of {_number(unpacked)}; set data.pack=false or use train.epochs"
        )
    return lines


def length_lines(loader: Loader, positions: int | None) -> list[str]:
    """Returns a line if rows are longer than the model's positions (None: unknown)."""
    if positions is None or loader.sequence_length <= positions:
        return []
    longest = max(len(document.tokens) for document in loader.documents)
    kind, so = "note", "so all fit"
    if longest > positions:
        kind, so = "warning", f"and results beyond position {positions} are unreliable"
    return [
        f"{kind}: train.sequence_length={loader.sequence_length} is longer than the {positions} "
        "positions of the model (with rope scaling); the longest document has "
        f"{counted(longest, 'token')}, {so}"
    ]


def _number(value: float) -> str:
    """Formats with at most two decimals: 12.63, 3, 0.04."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value >= 0.01 else f"{value:.2g}"
