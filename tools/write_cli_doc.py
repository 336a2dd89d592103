"""Writes docs/reference/cli.md: every command with its options, from the commands' own parsers.

python tools/write_cli_doc.py [--out FILE]
"""

import argparse
import importlib
import pathlib
from collections.abc import Iterator
from unittest import mock

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = ("train", "evaluate", "generate", "export", "report", "inspect", "alpha", "convert")
COMMANDS += ("pretrain", "evaluation.compare")
HEAD = """# Commands

Written by `tools/write_cli_doc.py` from the parsers of the commands; `--help` says the same.
All commands exit with 0 when done, with 2 for a mistake in the input, with 1 when the work failed,
and with 75 when a signal or the loss of another process stopped them: the same command resumes.
[Config](config.md) has the fields of `section.field=value`.
"""


class Found(Exception):
    """Carries the parser of a command, which is about to parse."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs/reference/cli.md")
    out = parser.parse_args().out
    out.write_text(page(), encoding="utf-8")
    print(f"wrote {out}: {len(COMMANDS)} commands")


def page() -> str:
    """Returns the whole page."""
    return "\n".join([HEAD, *map(section, COMMANDS)])


def section(name: str) -> str:
    """Returns one command: its description as the module has it, and a table of arguments."""
    parser = parser_of(name)
    text = [f"## {name}", "", "```text", parser.description.strip(), "```", ""]
    for title, each in [("", parser), *subcommands(parser)]:
        rows = [row(action) for action in each._actions if is_shown(action)]
        if rows:
            text += [f"### {name} {title}", ""] if title else []
            text += ["| argument | meaning |", "|---|---|", *rows, ""]
    return "\n".join(text)


def parser_of(name: str) -> argparse.ArgumentParser:
    """Returns the parser of a command, caught when it is about to parse."""
    module = importlib.import_module(f"drlora_jax.{name}")

    def stop(self, *_):
        raise Found(self)

    with mock.patch("argparse.ArgumentParser.parse_known_args", stop):
        with mock.patch("drlora_jax.cli.Parser.parse_known_args", stop):
            try:
                module.main([])
            except Found as found:
                return found.args[0]
    raise AssertionError(f"{name} did not parse its arguments")


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def is_shown(action: argparse.Action) -> bool:
    return not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)


def row(action: argparse.Action) -> str:
    """Returns an argument with what it takes, whether it is required, and its help."""
    name = ", ".join(action.option_strings)
    value = "" if action.nargs == 0 else value_of(action)
    shown = " ".join(filter(None, (name, value))).replace("|", r"\|")
    needed = "required" if action.option_strings and action.required else ""
    choices = f"one of {', '.join(map(str, action.choices))}" if action.choices else ""
    default = f"default {action.default}" if is_default_shown(action) else ""
    help_text = (action.help or "").replace("|", r"\|")
    said = "; ".join(filter(None, (help_text, choices, needed, default)))
    return f"| `{shown}` | {said} |"


def value_of(action: argparse.Action) -> str:
    if action.metavar:
        return action.metavar
    return action.dest.upper() if action.option_strings else action.dest


def is_default_shown(action: argparse.Action) -> bool:
    has_one = action.default not in (None, False, [], argparse.SUPPRESS)
    return has_one and "default" not in (action.help or "")


if __name__ == "__main__":
    main()
