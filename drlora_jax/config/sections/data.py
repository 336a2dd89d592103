"""What is read, and how it is made into rows."""

import datetime
from dataclasses import dataclass
from typing import Literal

from drlora_jax.config.sections.section import Section, positive, require


@dataclass(frozen=True)
class DataSection(Section):
    path: tuple[
        str, ...
    ] = ()  # files of data/file_readers.py, folders of them, globs, bundled:FILE, or a `datasets`
    # NAME[:CONFIG] (with format=choice: TASK=PATH, see drlora_jax/data/multiple_choice.py)
    eval_path: tuple[str, ...] = ()
    split: str = "train"  # of a `datasets` name, or of a folder whose files say it
    eval_split: str = "validation"
    format: Literal["auto", "prompt_response", "alpaca", "chat", "text", "choice"] = "auto"
    prompt_field: str = "prompt"
    response_field: str = "response"
    messages_field: str = "messages"
    text_field: str = "text"
    template: str = "auto"  # a name of drlora_jax/data/templates.py, or `tokenizer` for its own
    # Control tokens (<|endoftext|>, ...) in the rows' own text: `split` reads them as ordinary
    # text, so that only the template writes control tokens; `keep` takes them for what they are.
    # `auto` is `keep` for format=text and `split` for every other.
    special_tokens: Literal["auto", "split", "keep"] = "auto"
    date: str = "auto"  # YYYY-MM-DD for a chat template that reads the clock; auto: of the start
    unread: Literal["say", "stop"] = "say"  # what to do about fields that nothing reads
    loss_on: Literal["response", "all"] = "response"
    bad_rows: Literal["stop", "skip"] = "stop"
    too_long: Literal["truncate", "skip", "stop", "split"] = "truncate"
    max_rows: int | None = None  # of the training set, for experiments
    shuffle: bool = True
    pack: bool = True  # several documents in one row, with segment ids

    def check(self):
        if self.max_rows is not None:
            positive("data", {"max_rows": self.max_rows})
        if self.date != "auto":
            require(_is_date(self.date), f"data.date must be auto or YYYY-MM-DD, got {self.date}.")
        require(
            self.too_long != "split" or self.format == "text",
            'data.too_long="split" cuts documents, so it needs data.format="text", '
            f'got data.format="{self.format}".',
        )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
