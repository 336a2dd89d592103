"""The page docs/errors.md: what every case ends with."""

import html
import pathlib
import re

from tests.error_cases.case import Case, Outcome

HEAD = """# Mistakes and their messages

`error:` is a mistake in what was given: exit code 2, one line, nothing written, no weights loaded.
`failed:` is a run that ended after it had started: exit code 1, the reason is the last line.

Written by `tools/write_errors_doc.py` out of `tests/error_cases`, which runs each of these. Where
"..." stands, a library says more, by its version.
"""
TABLE = "| what is wrong | exit | message |\n|---|---|---|\n"


def page(rows: dict[str, list[str]]) -> str:
    """The document; `rows` holds the lines of `row` by kind of case."""
    parts = [HEAD]
    for kind, lines in rows.items():
        title = kind if "." in kind else kind[0].upper() + kind[1:]
        parts.append(f"## {title}\n\n{TABLE}" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def row(case: Case, outcome: Outcome, folder: pathlib.Path) -> str:
    """A line of the table, without what differs between machines and versions."""
    line = outcome.errors[-1].replace(f"{folder}/", "").replace(str(folder), ".")
    line = re.sub(case.varies, "...", line) if case.varies else line
    return f"| {_cell(case.what)} | {outcome.code} | {_cell(line)} |"


def _cell(text: str) -> str:
    text = re.sub(r"(.)\1{20,}", r"\1\1\1...", text)
    text = text if len(text) <= 300 else f"{text[:300]}..."
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return html.escape(text, quote=False).replace("|", "\\|")
