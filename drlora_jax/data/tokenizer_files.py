"""Loads the tokenizer of a model directory as its files define it; nothing is executed.

`tokenizer.json` describes a tokenizer completely. transformers may build a different one from it:
the class that tokenizer_config.json (or the model type) names can add its own normalizer, splitter
or decoder, in some versions and not in others. So the result of `AutoTokenizer` is compared with
the file, and if they differ the file is loaded without a class. The file also decides whether texts
begin with BOS (its post-processor), as in transformers 5, which ignores `add_bos_token` and
`add_eos_token` of tokenizer_config.json if there is a tokenizer.json. Special tokens, chat
templates and limits come from tokenizer_config.json and the files beside it, in either case.
"""

import functools
import importlib.util
import pathlib
import re
from collections.abc import Callable

from drlora_jax.data.tokenizer_probe import first_difference, sentencepiece_difference
from drlora_jax.errors import UserError
from drlora_jax.system.imports import load_package
from drlora_jax.system.paths import ABSENT, check_downloaded, kind_of, read_json

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Any one of these is enough for transformers; tokenizer_config.json alone is not.
_VOCABULARY_FILES = (
    TOKENIZER_FILE,
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXT_FILES = ("merges.txt", "chat_template.jinja", "chat_template.json")
# Those of transformers' settings that describe how the vocabulary is built.
_OF_THE_BACKEND = ("added_tokens_decoder", "tokenizer_object", "tokenizer_file", "vocab_file")
_OF_THE_BACKEND += ("vocab", "merges", "merges_file", "post_processor", "backend")
_RANKED_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # the format of tiktoken


def load_tokenizer(model_dir: str | pathlib.Path):
    """Loads the tokenizer of a model directory; its ids and texts are those of tokenizer.json."""
    transformers = load_package("transformers", "Loading a tokenizer")
    folder = pathlib.Path(model_dir)
    _check_files(folder)

    def by_class():
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )

    file = folder / TOKENIZER_FILE
    if not file.is_file():
        processor = _sentencepiece(folder)
        classes = [by_class]
        if processor is not None:
            free = transformers.PreTrainedTokenizerFast
            classes.append(lambda: free.from_pretrained(str(folder), local_files_only=True))
        return _first_that_agrees(folder, classes, processor)
    own = _read_own(file)
    loaded, reason = _attempt(by_class)
    if loaded is not None:
        difference, reason = _attempt(lambda: first_difference(loaded, own))
        if not (difference or reason):
            return loaded
    return _without_class(transformers, folder, own, loaded)


def end_token_ids(
    tokenizer, directory: pathlib.Path, vocab_size: int | None = None
) -> tuple[int, ...]:
    """Returns the tokens that end an answer: the tokenizer's eos, then what the model's files name.

    generation_config.json and config.json hold a number or a list; ids that the model cannot write
    (`vocab_size` or more) are left out.
    """
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        file = pathlib.Path(directory) / name
        if kind_of(file) == ABSENT:
            continue
        values = read_json(file)
        text_values = values.get("text_config")  # the language model's part of a larger one
        for part in (values, text_values if isinstance(text_values, dict) else {}):
            ends += _end_ids(part.get("eos_token_id"), file)
    limit = float("inf") if vocab_size is None else vocab_size
    return tuple(dict.fromkeys(each for each in ends if each < limit))


def _end_ids(given, file: pathlib.Path) -> list[int]:
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(each) is not int for each in ids):
        raise UserError(
            f"{file}: eos_token_id must be a token id or a list of token ids, got {given!r}; "
            "correct or remove it."
        )
    return [each for each in ids if each >= 0]


def _check_files(folder: pathlib.Path) -> None:
    """Refuses a directory without a tokenizer, and files that are not what their names say."""
    # Some versions of transformers build an empty tokenizer out of a config alone.
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise UserError(
            f"{folder} has no tokenizer: none of {', '.join(_VOCABULARY_FILES)}. "
            "Copy the tokenizer files of the model there."
        )
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for file in [folder / name for name in (*_VOCABULARY_FILES, *_TEXT_FILES)] + templates:
        check_downloaded(file)
    for name in _SETTINGS_FILES:
        if kind_of(folder / name) != ABSENT:
            read_json(folder / name)


def _first_that_agrees(folder: pathlib.Path, classes: list[Callable], processor):
    """Returns the first class that agrees with the SentencePiece model, for a folder without
    tokenizer.json.
    """
    reasons = []
    for make in classes:
        loaded, reason = _attempt(make)
        if loaded is not None:
            difference, reason = _attempt(lambda it=loaded: sentencepiece_difference(it, processor))
            if not (difference or reason):
                return loaded
            reason = reason or f"as {type(loaded).__name__}, {difference}"
        reasons.append(reason)
    newer = (
        ""
        if processor is None
        else "; update transformers, or use a tokenizer.json that a newer version wrote"
    )
    raise UserError(f"The tokenizer of {folder} does not load: {reasons[0]}{newer}.")


def _sentencepiece(folder: pathlib.Path):
    """Returns the processor of a SentencePiece model, if there is one. Says what to install where
    sentencepiece or tiktoken is missing, since transformers takes one kind of file for the other.
    """
    for name in SENTENCEPIECE_FILES:
        file = folder / name
        if not file.is_file():
            continue
        with open(file, "rb") as stream:
            is_ranked = _RANKED_LINE.match(stream.readline(512)) is not None
        package = "tiktoken" if is_ranked else "sentencepiece"
        if importlib.util.find_spec(package) is None:
            kind = "a list of ranked tokens" if is_ranked else "a SentencePiece model"
            needed = package if is_ranked else f"{package} protobuf"
            convert = (
                "from transformers import PreTrainedTokenizerFast as T; "
                f"T.from_pretrained('{folder}').save_pretrained('{folder}')"
            )
            raise UserError(
                f"{file} is {kind} without a tokenizer.json: pip install {needed}, or convert it "
                f'once on a machine that has it: python -c "{convert}"'
            )
        if not is_ranked:
            processors = load_package("sentencepiece", f"Reading {file}")
            made, reason = _attempt(functools.partial(processors.SentencePieceProcessor, str(file)))
            if reason:
                raise UserError(f"{file} does not load: {reason}; copy it again.")
            return made
    return None


def _read_own(file: pathlib.Path):
    """Loads the `tokenizers.Tokenizer` of the file, without truncation and padding."""
    tokenizers = load_package("tokenizers", "Loading a tokenizer")
    own, reason = _attempt(lambda: tokenizers.Tokenizer.from_file(str(file)))
    if reason:
        raise UserError(f"{file} does not load: {reason}; copy it again.")
    own.no_truncation()
    own.no_padding()
    return own


def _without_class(transformers, folder: pathlib.Path, own, by_class):
    """Returns the tokenizer of tokenizer.json, with the settings of the files beside it.

    Args:
      by_class: the result of `AutoTokenizer`, or None. Special tokens that only its class names
        are kept if the file has them: GPT-2's tokenizer_config.json names no end of text.
    """
    made, reason = _attempt(lambda: _dressed(transformers, folder, own, by_class))
    difference = None
    if made is not None:
        difference, reason = _attempt(lambda: first_difference(made, own))
    if reason:
        raise UserError(f"The tokenizer of {folder} does not load: {reason}")
    if difference:
        name = type(made if by_class is None else by_class).__name__
        raise UserError(
            f"{folder}: the class {name} and tokenizer.json disagree: {difference}. If only "
            "tokenizer_config.json or added_tokens.json name some tokens, remove them there, or "
            "write all files again with save_pretrained."
        )
    return made


def _dressed(transformers, folder: pathlib.Path, own, by_class):
    read = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    settings = {k: v for k, v in read.init_kwargs.items() if k not in _OF_THE_BACKEND}
    for name in read.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(read, name, None)
        if token is None and by_class is not None:
            token = getattr(by_class, name, None)
            if token is not None and own.token_to_id(str(token)) is None:
                token = None  # the class's default, which this vocabulary does not have
        settings[name] = token
    settings["chat_template"] = read.chat_template
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=own, **settings)
    have = made.get_vocab()
    more = [t for _, t in sorted(read.added_tokens_decoder.items()) if t.content not in have]
    made.add_tokens(more)
    return made


def _attempt(make: Callable):
    """Returns (value, "") or (None, reason): tokenizers raise exceptions of all kinds, also at the
    first text, and a panic of the Rust code is no Exception.
    """
    try:
        return make(), ""
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        first = str(error).strip().partition("\n")[0]
        return None, f"{type(error).__name__}: {first}"
