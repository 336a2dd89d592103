"""Selects the data files of a folder, and those of a split.

File names determine the split by the rules of `datasets`: `data/NAME-00000-of-00003.parquet`, else
a folder name, else a file name that contains one of the words below.
"""

import pathlib
import re

from drlora_jax.data.file_readers import KNOWN, ending_of
from drlora_jax.errors import UserError
from drlora_jax.system.paths import FILE, kind_of

SAVED_SET, SAVED_SETS = "state.json", "dataset_dict.json"  # written by `save_to_disk`
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}\b")
# Files next to data, or in a model directory, that are not data.
_NOT_DATA = {SAVED_SET, SAVED_SETS, "dataset_info.json", "dataset_infos.json", "croissant.json"}
_NOT_DATA |= {"config.json", "generation_config.json", "adapter_config.json", "pretrain.json"}
_NOT_DATA |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"}
_NOT_DATA |= {"added_tokens.json", "trainer_state.json", "preprocessor_config.json"}
_NOT_DATA |= {"processor_config.json", "chat_template.json"}


def is_data(file: pathlib.Path) -> bool:
    """Returns whether the name is that of a data file."""
    name = file.name
    is_hidden = name.startswith((".", "__"))
    is_other = name.lower() in _NOT_DATA or name.lower().endswith(".index.json")
    return bool(ending_of(name)) and not is_hidden and not is_other


def data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns all data files below a folder, in order, hidden ones excluded."""
    try:
        return [
            file
            for file in sorted(folder.rglob("*"))
            if is_data(file)
            and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
            and kind_of(file) == FILE
        ]
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}.") from error


def choose_shards(
    name: str, folder: pathlib.Path, split: str, setting: str = ""
) -> list[pathlib.Path]:
    """Returns the data files of a folder; of one split where file names name splits.

    Args:
      setting: the field that chooses the split, for a message; "" if there is none.
    """
    files = data_files(folder)
    if not files:
        raise UserError(f"{name} is a directory without data files.{_why_nothing(name, folder)}")
    _check_alike(name, folder, files)
    by_split: dict[str | None, list[pathlib.Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file.relative_to(folder)), []).append(file)
    wanted = _SPLIT_OF_WORD.get(split, split)
    if len(by_split) == 1 and next(iter(by_split)) not in SPLIT_WORDS:
        return files
    if None in by_split:
        raise UserError(
            f"{name} has files of the split {_listed(by_split)} and files whose names say no "
            f"split, such as {by_split[None][0].relative_to(folder)}; name the files you want, or "
            "give a glob."
        )
    if wanted not in by_split:
        other = min(by_split)
        example = f"{name.rstrip('/')}/{by_split[other][0].relative_to(folder)}"
        raise UserError(
            f"{name} has no file of the split {split}, only of {_listed(by_split)}; "
            f"{way_to_split(setting, other)}name the file, such as {example}."
        )
    return by_split[wanted]


def way_to_split(setting: str, split: str) -> str:
    """Returns how to choose a split other than by naming files, for the middle of a message."""
    return f"set {setting}={split}, or " if setting else ""


def split_of(file: pathlib.PurePath) -> str | None:
    """Returns the split that a path below a data set's folder names; None if it names none."""
    shard = _SHARD.match(file.name)
    if shard and (file.parent.name == "data" or _word_split(shard[1])):
        return _SPLIT_OF_WORD.get(shard[1], shard[1])
    parts = [*file.parts[:-1], file.name]
    return next(filter(None, map(_word_split, parts)), None)


def _word_split(text: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", text)
    return next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), None)


def _listed(by_split: dict) -> str:
    return ", ".join(sorted(split for split in by_split if split is not None))


def _check_alike(name: str, folder: pathlib.Path, files: list[pathlib.Path]) -> None:
    """Refuses a folder that may have the same rows twice, or rows of several data sets."""
    endings = sorted({ending_of(file.name) for file in files})
    if len(endings) > 1:
        raise UserError(
            f"{name} has files of several kinds ({', '.join(endings)}), which may hold the same "
            f"rows twice; name the files you want, or give a glob such as "
            f"{name.rstrip('/')}/**/*{endings[0]}."
        )
    tops = {file.relative_to(folder).parts[0] for file in files}
    sets = sorted(tops & _configurations(folder / "README.md"))
    if len(sets) > 1:
        raise UserError(
            f"{name} has several data sets ({', '.join(sets)}) according to its README.md; give "
            f"one of them, such as {name.rstrip('/')}/{sets[0]}."
        )


def _configurations(card: pathlib.Path) -> set[str]:
    """Returns the configurations that a data set's card on the hub names."""
    try:
        text = card.read_text(encoding="utf-8", errors="replace") if kind_of(card) == FILE else ""
    except OSError:
        return set()
    return set(re.findall(r"^\s*-?\s*config_name:\s*['\"]?([^\s'\"]+)", text, re.MULTILINE))


def _why_nothing(name: str, folder: pathlib.Path) -> str:
    """Explains what a folder without data files is instead, as far as that can be seen."""
    if (folder / "config.json").is_file():
        return " It looks like a model directory or a run; data.path is for rows."
    found = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    has = f" It has {', '.join(found[:3])}." if found else " It is empty."
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        has += " It hides the `datasets` name of the hub: rename it to read that one."
    return f"{has} Known file types are {KNOWN}."
