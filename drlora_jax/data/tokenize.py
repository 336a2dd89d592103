"""Converts text to token ids and the mask of tokens to predict.

A document is tokenised as one text: its ids are the tokenizer's own, not those of concatenated
pieces, and token spans tell which tokens belong to a response. Guarded control tokens
(`segments.guard`) are tokenised as ordinary text, all others as control tokens. The other functions
on tokenizers are re-exported here: loading, end tokens, identity, decoding.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drlora_jax.data.backends import Encoded, encode_texts
from drlora_jax.data.borders import cut_at_borders
from drlora_jax.data.decoding import decode_after, prompt_tail
from drlora_jax.data.segments import BadRow, Segment, Written
from drlora_jax.data.tokenizer_files import end_token_ids, load_tokenizer
from drlora_jax.data.tokenizer_identity import tokenizer_identity
from drlora_jax.errors import UserError

__all__ = [
    "decode_after",
    "end_token_ids",
    "load_tokenizer",
    "prompt_tail",
    "tokenizer_identity",
]
CUT_STARTS = "answers that begin inside a token"
_AT_ONCE = 1000  # documents: spans of tokens take more memory than their ids
_NAMED = 5  # tokens in a message


class Document(NamedTuple):
    tokens: np.ndarray  # int32 [n]
    is_target: np.ndarray  # bool [n]: whether the token is predicted; the first one never is


def pad_token(tokenizer, vocab_size: int | None = None) -> int:
    """Returns the token that fills rows up, masked: the padding token, or eos if the tokenizer has
    none.
    """
    pad_id = tokenizer.pad_token_id
    if pad_id is None or (vocab_size is not None and pad_id >= vocab_size):
        return tokenizer.eos_token_id
    return pad_id


def check_vocabulary(tokenizer, vocab_size: int) -> str | None:
    """Refuses a tokenizer with tokens that have no embedding row, unless rows can do without them.

    Control tokens beyond the embedding table are often used for padding only: they are reported in
    the returned line, and `check_row_tokens` refuses a row that contains one.
    """
    beyond = _beyond(tokenizer, vocab_size)
    if not beyond:
        return None
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    needed = set(beyond) - special
    needed |= {tokenizer.eos_token_id, *_bos([], tokenizer)} & set(beyond)
    if needed:
        names = token_names({index: beyond[index] for index in sorted(needed)})
        raise UserError(
            f"The model has {vocab_size} embedding rows, but none for {names} of its tokenizer; "
            "use the model's own tokenizer files, without tokens added for another model."
        )
    unused = pad_token(tokenizer, vocab_size) != pad_token(tokenizer)
    padding = f"; rows are padded with {tokenizer.eos_token}" if unused else ""
    return f"no embedding row for {token_names(beyond)} of the tokenizer{padding}"


def check_row_tokens(
    tokens: Sequence[int] | np.ndarray, tokenizer, vocab_size: int, template: str = ""
) -> None:
    """Raises BadRow for ids that the embedding table does not have.

    Args:
      template: the template that wrote the row's control tokens, if its own text has none.
    """
    ids = np.asarray(tokens)
    if ids.size == 0 or ids.max() < vocab_size:
        return
    beyond = _beyond(tokenizer, vocab_size)
    names = token_names(
        {index: beyond.get(index, "?") for index in np.unique(ids[ids >= vocab_size])}
    )
    if template:
        raise BadRow(
            "token without an embedding",
            f"data.template={template} writes {names}, but the model has {vocab_size} embedding "
            "rows; use the model's own tokenizer files, or another data.template",
        )
    raise BadRow(
        "token without an embedding",
        f"the text has {names}, but the model has {vocab_size} embedding rows; remove it, or set "
        "data.special_tokens=split if it is not meant as a control token",
    )


def _beyond(tokenizer, vocab_size: int) -> dict[int, str]:
    pairs = ((index, token) for token, index in tokenizer.get_vocab().items())
    return dict(sorted(pair for pair in pairs if pair[0] >= vocab_size))


def token_names(tokens: dict[int, str]) -> str:
    """Lists tokens with their ids, for a message."""
    named = [f"{token} ({index})" for index, token in list(tokens.items())[:_NAMED]]
    more = f" and {len(tokens) - _NAMED} more" if len(tokens) > _NAMED else ""
    return f"the token{'s' if len(tokens) > 1 else ''} {', '.join(named)}{more}"


def check_tokenizer(tokenizer) -> None:
    """Refuses a tokenizer without an end-of-text token: the model could not learn to end its
    answers.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no eos token; set eos_token in tokenizer_config.json.")


def encode_prompt(text: str | Sequence[Segment], tokenizer) -> list[int]:
    """Tokenises the start of a document, with the BOS token if documents have one."""
    segments = [Segment(text, False)] if isinstance(text, str) else list(text)
    ids = encode_texts([segments], tokenizer)[0].ids
    return _bos(ids, tokenizer) + ids


def encode_document(written: Written | Sequence[Segment], tokenizer, loss_on: str) -> Document:
    """Tokenises one document; see `encode_documents`."""
    return encode_documents([written], tokenizer, loss_on)[0]


def encode_documents(
    written: Sequence[Written | Sequence[Segment]],
    tokenizer,
    loss_on: str,
    counts: Counter | None = None,
) -> list[Document]:
    """Tokenises documents and marks the tokens to be predicted.

    Eos is appended if the template has not ended the document and its last token is not eos.

    Args:
      written: the output of a template; plain segments are a document that no template has ended.
      loss_on: "response", or "all" for every token but the first.
      counts: receives CUT_STARTS, the number of responses whose first characters share a token
        with the text before them, so that they are not learned.
    """
    check_tokenizer(tokenizer)
    counts = Counter() if counts is None else counts
    start = _first_of_a_text(tokenizer)
    documents = []
    for at in range(0, len(written), _AT_ONCE):
        batch = [_as_written(each) for each in written[at : at + _AT_ONCE]]
        texts = [each.segments for each in batch]
        found = encode_texts(texts, tokenizer)
        if loss_on == "response":
            found = cut_at_borders(found, texts, tokenizer)
        documents += [
            _document(*pair, tokenizer, start, loss_on, counts)
            for pair in zip(batch, found, strict=True)
        ]
    return documents


def _as_written(written: Written | Sequence[Segment]) -> Written:
    return written if isinstance(written, Written) else Written(list(written), False)


def _document(
    written: Written, encoded: Encoded, tokenizer, start, loss_on: str, counts: Counter
) -> Document:
    is_response, cut_starts = _inside_responses(encoded, written.segments)
    counts[CUT_STARTS] += cut_starts
    bos = _bos(encoded.ids, tokenizer, start)
    ids, is_response = bos + encoded.ids, [False] * len(bos) + is_response
    ends_learned = not written.segments or written.segments[-1].is_response
    if not written.is_ended:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
            is_response.append(False)
        is_response[-1] = ends_learned
    is_target = np.array(is_response) if loss_on == "response" else np.ones(len(ids), bool)
    is_target[:1] = False  # no token precedes it
    return Document(np.array(ids, np.int32), is_target)


def _first_of_a_text(tokenizer) -> int | None:
    # Not with an empty text: there, a token added at the end would look like one at the start.
    return next(iter(tokenizer("a").input_ids), None)


_ASK = object()


def _bos(ids: list[int], tokenizer, start=_ASK) -> list[int]:
    """Returns the BOS token, if this tokenizer starts texts with one and this text does not have it
    yet.
    """
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos]:
        return []
    return [bos] if bos == (_first_of_a_text(tokenizer) if start is _ASK else start) else []


def _inside_responses(encoded: Encoded, segments: Sequence[Segment]) -> tuple[list[bool], int]:
    """Returns which tokens lie wholly inside a response, and how many responses begin inside a
    token.

    A token across the border contains characters of the prompt: at generation time the prompt is
    tokenised alone and that token never appears, so it is not learned either. The same holds for a
    token that extends from a response into the next turn.
    """
    learned = np.array([segment.is_response for segment in segments], bool)
    token_starts, token_ends = encoded.starts, encoded.ends
    if not learned.any() or not encoded.ids:
        return [False] * len(encoded.ids), 0
    starts, ends = encoded.borders[:-1][learned], encoded.borders[1:][learned]
    # The only span that may contain the token's last character.
    span = np.searchsorted(starts, token_ends, side="left") - 1
    inside = (span >= 0) & (token_starts >= starts[span]) & (token_ends <= ends[span])
    follows_prompt = ~np.concatenate([[True], learned[:-1]])
    has_text = encoded.borders[1:] > encoded.borders[:-1]
    begins = encoded.borders[:-1][learned & follows_prompt & has_text]
    first = np.searchsorted(token_ends, begins, side="right")  # the first token that ends behind
    first = np.minimum(first, len(token_ends) - 1)
    cut = (token_starts[first] < begins) & (begins < token_ends[first])
    return inside.tolist(), int(cut.sum())
