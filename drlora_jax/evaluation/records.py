"""Defines the values that the parts of an evaluation exchange: settings, samples and scores."""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import NamedTuple


class Settings(NamedTuple):
    """Holds the user's settings; those that affect a score are stored with the score."""

    seed: int = 0
    limit: int | None = None  # items: a seeded sample of the file, in the file's order
    shots: int = 0
    chat: bool | None = None  # None: as the run was trained; multiple choice then uses no template
    batch_size: int = 8  # rows computed at once
    max_new_tokens: int | None = None  # None: the task's own
    max_length: int | None = None  # tokens per row; None: the loss uses the run's
    data_dir: str | None = None
    allow_code: bool = False
    template: str | None = None  # None: the run's; otherwise as in data.template, or `none`
    system: str | None = None  # a system message before every question

    def stored(self, names: Iterable[str]) -> dict:
        """Returns those of the named settings that differ from their defaults."""
        default = Settings()
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value != getattr(default, name)}


class Sample(NamedTuple):
    """Holds an answered item."""

    id: str  # the same for every model, so that two evaluations can be paired
    values: dict[str, float]  # per metric; 0 or 1 where the metric is a proportion
    fields: dict  # prompt, choices, gold, predicted, ... as written to the file of samples
    weight: float = 1.0  # weight in the mean: target tokens for a loss, otherwise 1


@dataclasses.dataclass(frozen=True)
class Score:
    """Holds the value of a metric with all that is needed to judge and reproduce it."""

    task: str
    metric: str
    value: float
    n: int  # items
    stderr: float | None = None
    ci95: tuple[float, float] | None = None
    version: str = "1"  # version of the task: prompts, metrics and extraction rules
    step: int | None = None  # step of the checkpoint; None: the base model without an adapter
    seed: int = 0
    prompt_hash: str = ""  # over all prompts and continuations in order
    data: str = ""  # the file or `datasets` name
    data_fingerprint: str = ""  # over all its rows
    base_fingerprint: str = ""
    adapter_fingerprint: str | None = None
    settings: dict = dataclasses.field(default_factory=dict)
    samples: str | None = None  # file of samples, relative to the run directory
    chance: float | None = None  # expected value of guessing an answer, mean over items

    def row(self) -> dict:
        """Returns the score as a JSON object."""
        return dataclasses.asdict(self)


def text_hash(texts: Iterable[str]) -> str:
    """Returns 16 hexadecimal digits of the sha256 of texts; boundaries between them count."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]
