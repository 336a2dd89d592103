"""A run as training leaves it, and what is asked of it in the same words."""

import argparse
import json

import numpy as np

from drlora_jax import generate
from drlora_jax.config import DataSection
from drlora_jax.data.documents import load_documents
from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.inference.words import Words
from drlora_jax.runs.resolved import Resolved, as_trained, resolve
from tests.street import made

QUESTION, ANSWER = "Tom has 3 apples and buys  4.\nHow many?", "He has 7.\n#### 7"
DATE = "2025-03-09"
LENGTH = 2048


def chat_row(system=None):
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


class Run:
    """A run's rows as training read them, and what it stored; the base lies in `base`."""

    def __init__(self, folder, kind, chat_template, rows, **settings):
        self.base = made.directory(folder, kind, chat_template)
        self.rows = rows
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = DataSection(path=(str(file),), date=DATE, **settings)
        tokenizer = load_tokenizer(self.base)
        self.documents, self.report = load_documents(section, tokenizer, LENGTH)
        size = len(tokenizer)
        found = resolve(self.report, tokenizer, self.base, vocab_size=size, revision=None, base="f")
        self.stored = json.dumps(found.to_json())
        file.unlink()

    def words(self, base=None) -> Words:
        """As `generate` finds them, in another process as far as values go."""
        base = base or self.base
        resolved = Resolved.from_json(json.loads(self.stored))
        tokenizer, notes = as_trained(load_tokenizer(base), resolved, base, "runs/it")
        ends = resolved.end_token_ids
        # The source of a run is only asked where nothing is stored.
        return Words(tokenizer, base, ends, object(), resolved, tuple(notes))

    def prefix(self, number=0) -> list[int]:
        """What stands before the first learned token of a document."""
        tokens, is_target, *_ = self.documents[number]
        return tokens[: int(np.argmax(is_target))].tolist()

    def was_asked(self, ids) -> bool:
        """Whether a prompt has the ids of training. Where the answer's first letters share a token
        with the prompt's last ones, which the report counts, that token is left out on both sides.
        """
        prefix = self.prefix()
        if not self.report.straddled:
            return ids == prefix
        return ids[: len(prefix) - 1] == prefix[:-1] and len(ids) >= len(prefix)


def arguments(**given):
    names = ("prompt", "input", "system", "messages", "row_format", "stop")
    values = dict.fromkeys(names) | {"template": "auto", "run": "runs/it"} | given
    return argparse.Namespace(**values)


def asked(words, rows, tmp_path, **given):
    """What `generate --messages` asks with."""
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asker = generate.Asker(words, arguments(messages=str(file), **given))
    return [prompt for prompt, _ in asker.asked()]
