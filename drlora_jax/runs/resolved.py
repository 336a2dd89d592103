"""The block `resolved` of config.json: the settings that a run was actually trained with.

A run stores what was resolved, not what was requested: how its rows were written, which tokenizer
and chat template wrote them, what ends an answer, which base model it started from. Later uses of
the run (resume, `generate`, `evaluate`, `export`) write the same text, wherever rows and base model
are by then. Changed token ids are refused. If the chat template, end tokens or date have changed,
a note says so, and those of the run are used.
"""

import dataclasses
import pathlib
from typing import NamedTuple

from drlora_jax.config import TrainConfig
from drlora_jax.data.documents import digest, load_documents
from drlora_jax.data.layouts import FieldNames
from drlora_jax.data.report import Report, shortened
from drlora_jax.data.templates import AS_IS, CHAT_TEMPLATES, choose_template, turn_end
from drlora_jax.data.tokenize import end_token_ids, token_names, tokenizer_identity
from drlora_jax.data.tokenizer_identity import added_since, template_identity
from drlora_jax.data.wording import CHOICE, TEXT, Wording, Writer, field_names, named_wording
from drlora_jax.errors import UserError

LONGEST_SYSTEM = 2000  # characters; a longer system message is not stored


class SystemMessages(NamedTuple):
    """The system messages of the training rows."""

    rows: int  # that begin with one
    of: int  # all rows
    text: str | None = None  # if it is the same in all


class Resolved(NamedTuple):
    """The block `resolved` of config.json."""

    wordings: tuple[tuple[str, Wording], ...]  # (path, its wording) in the order of reading
    system: SystemMessages
    end_token_ids: tuple[int, ...]  # the first is the tokenizer's own
    chat_template: str | dict | None  # the tokenizer's, if a wording uses it
    model_revision: str | None  # of a hub name
    tokenizer: dict[str, str]  # sha256 of its parts
    base: str  # fingerprint

    @property
    def wording(self) -> Wording:
        """The wording of the first path, which single prompts use."""
        return self.wordings[0][1]

    @property
    def date(self) -> str | None:
        return next((each.date for _, each in self.wordings if each.date), None)

    def wording_of(self, fields: dict) -> Wording:
        """Returns the wording of the path whose rows have these fields; the first if there is
        none.
        """
        for _, wording in self.wordings:
            if _fits(fields, wording):
                return wording
        return self.wording

    def to_json(self) -> dict:
        """Returns JSON values: the first path's wording at the top, `paths` only if they differ."""
        values = self.wording.to_json() | {
            "system": self.system._asdict(),
            "end_token_ids": list(self.end_token_ids),
            "date": self.date,
            "model_revision": self.model_revision,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "base": self.base,
        }
        if len({wording for _, wording in self.wordings}) > 1:
            values["paths"] = [{"path": path, **each.to_json()} for path, each in self.wordings]
        return values

    @classmethod
    def from_json(cls, values: dict) -> "Resolved":
        """Inverts `to_json`.

        Raises:
          UserError: if the block is incomplete.
        """
        try:
            paths = values.get("paths") or [{"path": "", **values}]
            return cls(
                wordings=tuple((each["path"], Wording.from_json(each)) for each in paths),
                system=SystemMessages(**values["system"]),
                end_token_ids=tuple(values["end_token_ids"]),
                chat_template=values["chat_template"],
                model_revision=values["model_revision"],
                tokenizer=dict(values["tokenizer"]),
                base=values["base"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                "config.json: this version cannot read the block `resolved` "
                f"({error!r}). If it was edited, restore it; if a newer version wrote it, use that "
                "version."
            ) from error


def resolve(
    report: Report, tokenizer, directory: pathlib.Path, *, vocab_size: int, revision, base: str
) -> Resolved:
    """Returns what a new run stores about its wording, base model and tokenizer."""
    wordings = tuple(report.wordings.items())
    ends = list(end_token_ids(tokenizer, directory, vocab_size))
    for _, wording in wordings:
        ends += [each for each in turn_end_ids(wording, tokenizer) if each not in ends]
    texts = set().union(*(part.system_texts for part in report.parts))
    same = next(iter(texts)) if len(texts) == 1 else None
    uses_own = any(wording.template == "tokenizer" for _, wording in wordings)
    return Resolved(
        wordings=wordings,
        system=SystemMessages(
            report.total("system_rows"),
            report.rows_read,
            same if same is not None and len(same) <= LONGEST_SYSTEM else None,
        ),
        end_token_ids=tuple(ends),
        chat_template=tokenizer.chat_template if uses_own else None,
        model_revision=revision,
        tokenizer=tokenizer_identity(tokenizer, directory),
        base=base,
    )


def turn_end_ids(wording: Wording, tokenizer) -> list[int]:
    """Returns the control token that the template puts behind an answer, if any."""
    if wording.is_as_is:
        return []
    text = turn_end(Writer(wording, tokenizer).style, tokenizer)
    return [] if text is None else [tokenizer.convert_tokens_to_ids(text)]


def as_trained(
    tokenizer, resolved: Resolved, directory: pathlib.Path, run_dir
) -> tuple[object, list[str]]:
    """Returns the tokenizer with the run's chat template and end token, and lines about what
    changed.

    Raises:
      UserError: if its token ids differ from those of the training.
    """
    now, then = tokenizer_identity(tokenizer, directory), resolved.tokenizer
    changed, notes = _without_additions(tokenizer, directory, run_dir, now, then)
    for name, what in (("vocabulary", "vocabulary"), ("probe", "way to split texts")):
        if name in changed:
            raise UserError(
                f"The tokenizer of {directory} is not the one that {run_dir} was trained with: its "
                f"{what} has changed (sha256 {then[name][:12]}, got {now[name][:12]}), so texts "
                "may have different token ids. Restore the tokenizer files of the training."
            )
    if "normalizer" in changed:
        notes.append(
            f"the tokenizer files of {directory} have changed since the training; the token ids "
            "of test texts are the same"
        )
    notes += _restore_template(tokenizer, resolved, "template" in changed, directory, run_dir)
    if "ends" in changed:
        notes.append(
            f"the end tokens of {directory} have changed since the training; answers end at those "
            f"of {run_dir} (ids {', '.join(map(str, resolved.end_token_ids))})"
        )
        end = resolved.end_token_ids[0] if resolved.end_token_ids else None
        if end is not None and tokenizer.eos_token_id != end:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer, notes


def _without_additions(
    tokenizer, directory: pathlib.Path, run_dir, now: dict, then: dict
) -> tuple[set[str], list[str]]:
    """Returns which parts have changed for a reason other than control tokens added since, such as
    one for padding, and lines about those tokens; the padding token is set back.
    """
    changed = {name for name in then if now.get(name) != then[name]}
    added = added_since(tokenizer, directory, then) if "vocabulary" in changed else None
    if added is None:
        return changed, []
    if added.ends_are_same:
        tokenizer.pad_token = added.pad_token
        changed -= {"ends"}
    note = (
        f"{directory}: {token_names(added.tokens)} added since the training of {run_dir}, which "
        "does not use it"
    )
    return changed - {"vocabulary", "probe"}, [note]


def _restore_template(
    tokenizer, resolved: Resolved, has_changed: bool, directory: pathlib.Path, run_dir
) -> list[str]:
    if resolved.chat_template is not None:
        tokenizer.chat_template = resolved.chat_template
        what = f"the chat template of {directory} is not the one that {run_dir} was trained with"
        return [f"{what}; the run's own is used"] if has_changed else []
    if has_changed and _had_no_chat_template(resolved):
        tokenizer.chat_template = None
        return [
            f"{directory} has a chat template now, but had none when {run_dir} was trained; it is "
            "not used"
        ]
    return []


def _had_no_chat_template(resolved: Resolved) -> bool:
    """Returns whether turns were written without a chat template: `auto` would now use the new
    one.
    """
    then = resolved.tokenizer["template"]
    wordings = [wording for _, wording in resolved.wordings]
    return then == template_identity(None) and any(each.format == "chat" for each in wordings)


def found_again(config: TrainConfig, data_fingerprint: str, tokenizer) -> Wording:
    """Returns the wording of a run without the block `resolved`, derived from base model and rows.

    Args:
      data_fingerprint: the digest of the documents that the run was trained with.

    Raises:
      UserError: if rows or base model have changed; the message says which options to give.
    """
    section = dataclasses.replace(config.data, special_tokens="keep")
    if section.format != "auto":
        return _given_wording(section, tokenizer)
    try:
        found = load_documents(section, tokenizer, config.train.sequence_length)
    except UserError as error:
        raise _lost(f"its rows cannot be read ({error})") from error
    if digest(found.documents) != data_fingerprint:
        raise _lost("its rows, or what reads them, have changed since")
    return next(iter(found.report.wordings.values()))


def _given_wording(section, tokenizer) -> Wording:
    """Returns the wording for a format that the config names, without reading a row."""
    template = choose_template(section.template, section.format, tokenizer)
    return Wording(section.format, template, field_names(section), "keep")


def _lost(why: str) -> UserError:
    return UserError(
        "The run does not record how its prompts were written (an earlier version or a converter "
        f"wrote it), and {why}. Give --template NAME (plain, question_answer, alpaca, chatml, "
        "tulu, tokenizer, or none for unchanged texts) and, for rows, --format NAME."
    )


def asked_wording(
    template: str | None, row_format: str | None, tokenizer, like: Wording | None
) -> Wording:
    """Returns the wording that `--template` and `--format` name, else one like the run's.

    Args:
      like: the run's wording, for everything that the options do not name.
    """
    if template is None and row_format is None:
        return like
    if template is None:
        template = choose_template("auto", row_format, tokenizer)
    found = named_wording(
        template,
        tokenizer,
        date=like.date if like else None,
        special_tokens=like.special_tokens if like and not like.is_as_is else "split",
    )
    if row_format is not None:
        choose_template("auto" if found.is_as_is else template, row_format, tokenizer)
        found = found._replace(format=row_format)
    elif like is not None and not like.is_as_is and _may_have(like.format, found):
        found = found._replace(format=like.format)
    return found._replace(fields=like.fields if like else FieldNames())


def _may_have(row_format: str, wording: Wording) -> bool:
    """Returns whether rows of this format can be written in that template."""
    if wording.template == AS_IS or row_format in (TEXT, CHOICE):
        return False
    return row_format != "chat" or wording.template in CHAT_TEMPLATES


def system_note(resolved: Resolved | None) -> str | None:
    """Returns a note if the prompts have no system message and the training rows had one."""
    if resolved is None or not resolved.system.rows:
        return None
    system = resolved.system
    what = f" ({shortened(system.text)})" if system.text else ""
    return (
        f"{system.rows} of {system.of} training rows began with a system message{what}, but these "
        "prompts have none (--system TEXT)"
    )


def _fits(fields: dict, wording: Wording) -> bool:
    names = wording.fields
    needed = {
        "chat": (names.messages,),
        "prompt_response": (names.prompt,),
        "alpaca": ("instruction",),
        "text": (names.text,),
    }.get(wording.format, ())
    return bool(needed) and all(name in fields for name in needed)
