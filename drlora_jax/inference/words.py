"""Opens the tokenizer and the prompt wording of `--run` or `--model`, before weights are read."""

import argparse
import dataclasses
import pathlib
from typing import Any

from drlora_jax.data.tokenize import end_token_ids, load_tokenizer
from drlora_jax.data.wording import Wording
from drlora_jax.errors import UserError
from drlora_jax.interop.hf_files import find_model, read_model_config
from drlora_jax.runs.resolved import Resolved, as_trained, found_again
from drlora_jax.runs.source import RunSource, find_run


@dataclasses.dataclass
class Words:
    """Holds a tokenizer, and how prompts for it are written."""

    tokenizer: Any
    directory: pathlib.Path  # directory of the base model
    end_token_ids: tuple[int, ...]
    source: RunSource | None = None  # None: a base model alone
    resolved: Resolved | None = None  # None: a base model alone, or a run of an earlier version
    notes: tuple[str, ...] = ()
    known_wording: Wording | None = None  # wording of the run's prompts, once it is known
    # Tokenizer settings restored from the training, where the directory now has different ones.
    restored: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.resolved is not None:
            self.known_wording = self.resolved.wording

    @property
    def is_run(self) -> bool:
        return self.source is not None

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def wording(self, template: str | None = None, row_format: str | None = None) -> Wording | None:
        """Returns the run's own wording. For a run of an earlier version it is recovered from the
        base model and the rows, unless a template is named, which needs neither.
        """
        if self.known_wording is not None or template is not None:
            return self.known_wording
        source = self.source
        config = source.config
        if row_format is not None:
            data = dataclasses.replace(config.data, format=row_format)
            config = dataclasses.replace(config, data=data)
        self.known_wording = found_again(config, source.data_fingerprint, self.tokenizer)
        return self.known_wording


def open_words(args: argparse.Namespace) -> Words:
    """Opens the `Words` of the model that the arguments of `cli.model_parser` name.

    Raises:
      UserError: If there is no such model, or its tokenizer is not the one of the training.
    """
    if args.run is None:
        check_only_run(args)
        return of_base(find_model(args.model, option="--model"))
    step = "latest" if args.base else args.step
    return of_run(find_run(args.run, step=step, model_path=args.model_path))


def check_only_run(args: argparse.Namespace) -> None:
    """Refuses options that apply only to a run."""
    given = [name for name in ("step", "base", "model_path") if _is_given(args, name)]
    if given:
        option = given[0].replace("_", "-")
        raise UserError(f"--{option} applies to --run and cannot be used with --model.")


def _is_given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) not in (None, False, "latest")


def of_base(directory: pathlib.Path) -> Words:
    vocab_size = read_model_config(directory).vocab_size  # first: refuses what is not a model
    tokenizer = load_tokenizer(directory)
    return Words(tokenizer, directory, end_token_ids(tokenizer, directory, vocab_size))


def of_run(source: RunSource) -> Words:
    """Returns the `Words` of a run, with the chat template, end tokens and date of its training."""
    words = of_base(source.directory)
    if source.resolved is None:
        return dataclasses.replace(words, source=source)
    before = _settings(words.tokenizer)
    tokenizer, notes = as_trained(
        words.tokenizer, source.resolved, source.directory, source.run_dir
    )
    after = _settings(tokenizer)
    return Words(
        tokenizer,
        source.directory,
        source.resolved.end_token_ids,
        source,
        source.resolved,
        tuple(notes),
        restored={name: after[name] for name in after if after[name] != before[name]},
    )


def _settings(tokenizer) -> dict:
    return {name: getattr(tokenizer, name) for name in ("chat_template", "eos_token")}
