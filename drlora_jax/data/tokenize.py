"""From text to token ids and the mask of tokens to be predicted.

A document is tokenised as one text: its ids are the tokenizer's own, not those of glued pieces, and
the offsets of the tokens say which of them belong to a response.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drlora_jax.data.packages import load_package
from drlora_jax.data.templates import Segment
from drlora_jax.errors import UserError
from drlora_jax.files import ABSENT, kind_of, read_json

# Any one of these is enough for transformers; tokenizer_config.json alone is not.
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)


class Document(NamedTuple):
    tokens: np.ndarray  # int32 [n]
    is_target: np.ndarray  # bool [n]: this token is to be predicted; the first one never is


def load_tokenizer(model_dir: str | pathlib.Path):
    """Loads the tokenizer of a model directory or hub name; nothing of it is executed."""
    transformers = load_package("transformers", "Loading a tokenizer")
    folder = pathlib.Path(model_dir)
    is_local = folder.is_dir()
    # Checked here: some versions of transformers build an empty tokenizer out of a config alone.
    if is_local and not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise UserError(
            f"{model_dir} has no tokenizer: none of {', '.join(_VOCABULARY_FILES)}. "
            "Copy the tokenizer files of the model there."
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(model_dir), trust_remote_code=False, local_files_only=is_local
        )
    except Exception as error:  # a broken file raises what its parser raises
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"The tokenizer of {model_dir} does not load: {type(error).__name__}: {reason}"
        ) from error


def pad_token(tokenizer) -> int:
    """What fills rows up: the padding token, or eos where there is none (padding is masked)."""
    pad_id = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad_id is None else pad_id


def check_vocabulary(tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer with token ids (added tokens included) that have no embedding row."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer's largest token id is {largest}, but the model has {vocab_size} "
            "embedding rows; use the model's own tokenizer."
        )


def check_tokenizer(tokenizer) -> None:
    """Refuses a tokenizer without an end-of-text token: answers would have no end to learn."""
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no eos token; set eos_token in tokenizer_config.json.")


def encode_prompt(text: str, tokenizer) -> list[int]:
    """Token ids of the start of a document, BOS token included where documents have one."""
    ids, _ = _encode([Segment(text, False)], tokenizer)
    return _bos(ids, tokenizer) + ids


def encode_document(segments: Sequence[Segment], tokenizer, loss_on: str) -> Document:
    """Tokenises rendered segments and marks the tokens to be predicted.

    Args:
      segments: of `templates.render`; their concatenation is the text.
      loss_on: "response", or "all" for every token but the first.
    """
    check_tokenizer(tokenizer)
    ids, is_response = _encode(segments, tokenizer)
    bos = _bos(ids, tokenizer)
    ids, is_response = bos + ids, [False] * len(bos) + is_response
    # A chat template may have written the end itself.
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        is_response.append(True)
    is_response[-1] = True
    is_target = np.array(is_response) if loss_on == "response" else np.ones(len(ids), bool)
    is_target[0] = False  # nothing stands before it
    return Document(np.array(ids, np.int32), is_target)


def _bos(ids: list[int], tokenizer) -> list[int]:
    """The BOS token, if this tokenizer starts texts with one and this text does not have it yet."""
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos]:
        return []
    # Asked with a letter: of an empty text, a token added at the end would look like one in front.
    return [bos] if list(tokenizer("a").input_ids)[:1] == [bos] else []


def _encode(segments: Sequence[Segment], tokenizer) -> tuple[list[int], list[bool]]:
    if not getattr(tokenizer, "is_fast", False):
        return _encode_apart(segments, tokenizer)
    text = "".join(segment.text for segment in segments)
    # verbose=False: a text over the model's length is cut later, with a count in the report.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_response = _inside_responses(encoded["offset_mapping"], segments)
    return list(encoded["input_ids"]), is_response


def _inside_responses(
    offsets: Sequence[tuple[int, int]], segments: Sequence[Segment]
) -> list[bool]:
    """Which tokens lie wholly inside a response.

    A token across the border holds characters of the prompt: at generation time the prompt is
    tokenised alone and that token never appears, so it is not learned either. For the same reason a
    token that runs on from a response into the next turn is none.
    """
    spans, start = [], 0
    for segment in segments:
        end = start + len(segment.text)
        if segment.is_response:
            spans.append((start, end))
        start = end
    if not spans:
        return [False] * len(offsets)
    starts, ends = (np.array(side) for side in zip(*spans, strict=True))
    token_starts, token_ends = np.array(offsets, int).reshape(-1, 2).T
    # The one span in which the token's last character could lie.
    span = np.searchsorted(starts, token_ends, side="left") - 1
    inside = (span >= 0) & (token_starts >= starts[span]) & (token_ends <= ends[span])
    return inside.tolist()


def _encode_apart(segments: Sequence[Segment], tokenizer) -> tuple[list[int], list[bool]]:
    """Tokenizers without offsets: piece by piece, so ids at the borders may differ a little."""
    ids, is_response = [], []
    for segment in segments:
        piece = list(tokenizer(segment.text, add_special_tokens=False, verbose=False).input_ids)
        ids += piece
        is_response += [segment.is_response] * len(piece)
    return ids, is_response


def end_token_ids(tokenizer, directory: pathlib.Path, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's eos, then those of generation_config.json and
    of config.json, each once. Ids without an embedding row are left out.

    Raises:
      UserError: for an `eos_token_id` that is neither a whole number nor a list of them.
    """
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        file = pathlib.Path(directory) / name
        given = read_json(file).get("eos_token_id") if kind_of(file) != ABSENT else None
        listed = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(token) is int for token in listed):
            raise UserError(
                f"{file}: eos_token_id must be a token id or a list of token ids, got {given!r}; "
                "correct or remove it."
            )
        ends += listed
    return tuple(dict.fromkeys(token for token in ends if 0 <= token < vocab_size))


def decode_after(tokenizer, prompt_tail_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text that new tokens add behind a prompt, special tokens left out.

    The new tokens are decoded together with those in front of them: a decoder treats the start of
    a text in its own way, and a character may begin in the prompt's last token.
    """

    def decode(ids) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    before, whole = decode(prompt_tail_ids), decode([*prompt_tail_ids, *new_ids])
    while not whole.startswith(before):
        if not before.endswith("\ufffd"):
            # New bytes made the prompt's own unreadable: they were no characters together.
            return decode(new_ids)
        before = before[:-1]  # half a character, which the new tokens go on with
    return whole[len(before) :]
