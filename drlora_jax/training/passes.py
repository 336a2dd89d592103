"""How often a run goes over its training data, and whether its rows are longer than its model.

Packing puts several documents into a row, so the same steps are more passes than without it; a
number of steps that was made for one document a row then trains on everything several times.
"""

from drlora_jax.config import TrainSection
from drlora_jax.data.loader import Loader
from drlora_jax.system.text import counted

MANY_PASSES = 10
MANY_PER_ROW = 2  # documents


def passes_lines(loader: Loader, section: TrainSection, total_steps: int) -> list[str]:
    """Rows of an epoch and passes over them; a warning where they are likely not what was meant."""
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
            f"({counted(epoch, 'row')} per epoch), so each step repeats rows: {passes} in all; "
            "lower train.batch_size"
        )
    elif rows >= MANY_PASSES * epoch:
        lines.append(
            f"warning: {passes} over the training data; is that meant? One pass is train.epochs=1"
        )
    # Who counts in epochs is told nothing new; less than one pass repeats nothing.
    elif section.steps and rows > epoch and documents > MANY_PER_ROW * epoch:
        lines.append(
            f"warning: packing puts {documents / epoch:.1f} documents into a row, so the steps are "
            f"{passes} and not {_number(unpacked)}; set data.pack=false, or count "
            "in train.epochs"
        )
    return lines


def length_lines(loader: Loader, positions: int | None) -> list[str]:
    """What to say where rows are longer than the model's positions (None: not known)."""
    if positions is None or loader.sequence_length <= positions:
        return []
    longest = max(len(document.tokens) for document in loader.documents)
    kind, so = "note", "so all fit"
    if longest > positions:
        kind, so = "warning", f"and tokens beyond position {positions} are read badly"
    return [
        f"{kind}: train.sequence_length={loader.sequence_length} is longer than the {positions} "
        "positions of the model (rope scaling counted); the longest document has "
        f"{counted(longest, 'token')}, {so}"
    ]


def _number(value: float) -> str:
    """With at most two decimals: 12.63, 3, 0.04."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value >= 0.01 else f"{value:.2g}"
