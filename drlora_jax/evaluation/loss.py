"""Computes loss and perplexity on files, document by document.

Documents are read, rendered and packed as in training, so the loss of a run's own held-out file is
the one that training measured. Here each document also has its own loss, which standard errors and
paired comparisons need. Text files (.txt, .md, plain or .gz) are split into windows that predict
every token except the first once. Letters: N predicted positions.
"""

import dataclasses
import gzip
import sys
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from drlora_jax.config import DataSection
from drlora_jax.data.documents import load_documents, windows
from drlora_jax.data.loader import stack_rows
from drlora_jax.data.packing import pack
from drlora_jax.data.segments import Segment
from drlora_jax.data.tokenize import Document, encode_document, pad_token
from drlora_jax.errors import RunError, UserError
from drlora_jax.evaluation.records import Sample
from drlora_jax.inference.context import warn_beyond
from drlora_jax.inference.model import Loaded
from drlora_jax.inference.scoring import CHUNK, jit_score
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes
from drlora_jax.system.numbers import ceil_div
from drlora_jax.system.paths import check_downloaded, local_path

TEXT_SUFFIXES = (".txt", ".md", ".txt.gz", ".md.gz")


def is_text_file(path: str) -> bool:
    return path.endswith(TEXT_SUFFIXES)


class Item(NamedTuple):
    """Holds a document, or a window of a text."""

    id: str  # its number in the file
    document: Document


def read_items(
    path: str, section: DataSection, tokenizer, length: int, date: str | None = None
) -> list[Item]:
    """Reads the documents of a file by the data settings of a run.

    Args:
      date: Date for chat templates that read the clock.
    """
    if is_text_file(path):
        document = encode_document([Segment(_read_text(path), True)], tokenizer, "all")
        documents = windows(document, length)
    else:
        section = dataclasses.replace(section, eval_path=(path,))
        found = load_documents(section, tokenizer, length, evaluation=True, date=date)
        documents = found.documents
        if processes.is_main():  # rows that are skipped or truncated change the loss
            for remark in found.report.remarks():
                print(f"note: {path}: {remark}", file=sys.stderr)
    return [Item(str(number), document) for number, document in enumerate(documents, 1)]


def item_texts(item: Item) -> list[str]:
    """Returns tokens and predicted positions as texts, for a hash."""
    tokens, is_target = item.document
    return [" ".join(map(str, tokens.tolist())), " ".join(map(str, np.flatnonzero(is_target)))]


def answer_items(
    loaded: Loaded, items: Sequence[Item], *, length: int, batch_size: int
) -> list[Sample]:
    """Computes the loss of each document: nats per target token, weighted by target tokens."""
    documents = [item.document for item in items]
    longest = max(items, key=lambda item: len(item.document.tokens))
    warn_beyond(
        loaded.directory, len(longest.document.tokens), f"document {longest.id} of the loss"
    )
    batch_size = mesh_lib.whole_shards(loaded.mesh, batch_size)
    lengths = np.array([len(document.tokens) for document in documents])
    rows = pack(lengths, length, np.arange(len(documents)))
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    targets = [_targets(documents, part) for part in parts]
    size = ceil_div(max(targets), CHUNK) * CHUNK  # one for all batches: one program
    pad_id = pad_token(loaded.tokenizer, loaded.model.config.vocab_size) or 0
    score, totals = jit_score(loaded), np.zeros(len(documents))
    for part, count in zip(parts, targets, strict=True):
        filled = part + [np.array([], np.int64)] * (batch_size - len(part))
        batch = stack_rows(documents, filled, length, pad_id)
        at_N = np.zeros(size, np.int32)
        at_N[:count] = np.flatnonzero(batch.target_mask_BT)
        placed = processes.place(batch, mesh_lib.rows(loaded.mesh))
        log_p_N, _ = jax.device_get(score(loaded.variables, placed, at_N))
        loaded.on_batch()
        # Positions are ordered by row, and within a row by document.
        order = np.concatenate(part)
        owner_N = np.repeat(order, [_targets(documents, [[index]]) for index in order])
        np.add.at(totals, owner_N, -log_p_N[:count].astype(np.float64))
    if not np.isfinite(totals).all():
        number = int(np.argmin(np.isfinite(totals))) + 1
        raise RunError(f"The loss of document {number} is {totals[number - 1]}.")
    return [_sample(item, float(nll)) for item, nll in zip(items, totals, strict=True)]


def _targets(documents: Sequence[Document], rows) -> int:
    """Counts the target tokens of packed rows."""
    return sum(int(documents[index].is_target.sum()) for row in rows for index in row)


def _sample(item: Item, nll: float) -> Sample:
    targets = int(item.document.is_target.sum())
    fields = {"tokens": len(item.document.tokens), "target_tokens": targets, "nll": nll}
    return Sample(item.id, {"loss": nll / targets}, fields, float(targets))


def _read_text(path: str) -> str:
    file = local_path(path, "--loss")
    check_downloaded(file, takes_pages=True)
    try:
        content = gzip.decompress(file.read_bytes()) if path.endswith(".gz") else file.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with text.")
    return text
