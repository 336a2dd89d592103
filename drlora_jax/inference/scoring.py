"""Computes log-likelihoods of continuations, packed many to a row.

A pair (context, continuation) is a document whose continuation is predicted. Documents are packed
into rows like training data, so a short pair costs its own tokens and no padding, and its result
does not depend on its neighbours. Only the hidden states at predicted positions are multiplied by
the output head, in chunks: no [tokens, vocabulary] array is ever created.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.data.loader import Batch, stack_rows
from drlora_jax.data.packing import pack
from drlora_jax.data.tokenize import Document, pad_token
from drlora_jax.inference.context import warn_beyond
from drlora_jax.inference.model import Loaded
from drlora_jax.models.transformer import Decoder, logits
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes

SHORTEST_ROW = 256  # tokens; rows have this length, or the next power of two that fits a document
CHUNK = 256  # predicted positions whose logits exist at once


class LogLikelihood(NamedTuple):
    total: float  # nats, summed over the continuation
    is_greedy: bool  # every token of the continuation is the most likely one
    tokens: int


Pair = tuple[Sequence[int], Sequence[int]]  # token ids of context and continuation


class Scorer:
    """Computes log-likelihoods with one model; compiled programs are kept between calls.

    Args:
      batch_size: Rows computed at once, rounded up to a multiple of the mesh's row shards.
      max_length: Tokens that the model reads; of longer pairs the start of the context is cut off.
    """

    def __init__(self, loaded: Loaded, *, batch_size: int = 8, max_length: int = 2048):
        self.max_length = max_length
        self._loaded, self._has_warned = loaded, False
        self._batch_size = mesh_lib.whole_shards(loaded.mesh, batch_size)
        self._score = jit_score(loaded)

    def __call__(self, pairs: Sequence[Pair]) -> list[LogLikelihood]:
        """Returns log p(continuation | context) of every pair.

        Raises:
          ValueError: If a part is empty, or a continuation is longer than max_length.
        """
        documents = [_document(index, pair, self.max_length) for index, pair in enumerate(pairs)]
        self._warn(documents)
        results: list[LogLikelihood | None] = [None] * len(pairs)
        pad_id = pad_token(self._loaded.tokenizer, self._loaded.model.config.vocab_size) or 0
        for batch, rows in _batches(documents, self._batch_size, pad_id):
            log_p_N, is_top_N = self._run(batch)
            start = 0
            # Predicted positions are ordered by row, and within a row as its documents are.
            for index in np.concatenate(rows).tolist():
                count = int(documents[index].is_target.sum())
                part = slice(start, start + count)
                total = float(np.sum(log_p_N[part], dtype=np.float64))
                results[index] = LogLikelihood(total, bool(np.all(is_top_N[part])), count)
                start += count
        return results

    def _warn(self, documents: Sequence[Document]) -> None:
        """Warns once that a pair is longer than the model supports."""
        # Nothing is predicted from the last token.
        longest = max((len(document.tokens) - 1 for document in documents), default=0)
        if not self._has_warned:
            what = "a context with its answer"
            self._has_warned = warn_beyond(self._loaded.directory, longest, what)

    def _run(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-probability of every predicted token, and whether it is the likeliest."""
        at_N = np.flatnonzero(batch.target_mask_BT).astype(np.int32)
        padded = np.pad(at_N, (0, -len(at_N) % CHUNK))
        placed = processes.place(batch, mesh_lib.rows(self._loaded.mesh))
        log_p_N, is_top_N = jax.device_get(self._score(self._loaded.variables, placed, padded))
        self._loaded.on_batch()
        return log_p_N[: len(at_N)], is_top_N[: len(at_N)]


def score_continuations(
    loaded: Loaded, pairs: Sequence[Pair], *, batch_size: int = 8, max_length: int = 2048
) -> list[LogLikelihood]:
    """Scores pairs with a `Scorer` of their own."""
    return Scorer(loaded, batch_size=batch_size, max_length=max_length)(pairs)


def jit_score(loaded: Loaded):
    """Returns the jitted `make_score` of a model; every process receives all results."""
    return jax.jit(
        make_score(loaded.model),
        out_shardings=mesh_lib.replicated(loaded.mesh),
    )


def make_score(model: Decoder):
    """Returns a pure `score(variables, batch, at [N]) -> (log-probability [N], is the likeliest
    [N])` of the targets at flat positions `at`; N is a multiple of CHUNK.
    """

    def score(variables, batch: Batch, at_N):
        hidden_BTD, _ = model.apply(
            variables, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
        )
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[at_N]
        targets_N = batch.targets_BT.reshape(-1)[at_N]

        def of_chunk(inputs):
            hidden_CD, targets_C = inputs
            logits_CV = logits(model.config, variables["params"], hidden_CD)
            target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
            log_p_C = target_C - jax.nn.logsumexp(logits_CV, axis=-1)
            return log_p_C, jnp.argmax(logits_CV, axis=-1) == targets_C

        chunks = (hidden_ND.reshape(-1, CHUNK, hidden_ND.shape[-1]), targets_N.reshape(-1, CHUNK))
        log_p, is_top = jax.lax.map(of_chunk, chunks)
        return log_p.reshape(-1), is_top.reshape(-1)

    return score


def _document(index: int, pair: Pair, max_length: int) -> Document:
    context, continuation = pair
    if not len(context) or not len(continuation):
        raise ValueError(f"Pair {index}: context and continuation need at least one token each.")
    if len(continuation) > max_length:
        raise ValueError(
            f"Pair {index}: the continuation has {len(continuation)} tokens, max_length is "
            f"{max_length}."
        )
    # One more than the model reads, since nothing is predicted from the last token.
    tokens = np.array([*context, *continuation], np.int32)[-(max_length + 1) :]
    return Document(tokens, np.arange(len(tokens)) >= len(tokens) - len(continuation))


def _batches(
    documents: Sequence[Document], batch_size: int, pad_id: int
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Yields batches with the document indices of their rows, grouped by row length (a power of
    two), so that one program serves each length.

    Rows of padding fill the last batch.
    """
    lengths = np.array([len(document.tokens) for document in documents])
    row_lengths = np.array([max(SHORTEST_ROW, 1 << (n - 1).bit_length()) for n in lengths.tolist()])
    for row_length in np.unique(row_lengths).tolist():
        rows = pack(lengths, row_length, np.nonzero(row_lengths == row_length)[0])
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            filled = part + [np.array([], np.int64)] * (batch_size - len(part))
            yield stack_rows(documents, filled, row_length, pad_id), part
