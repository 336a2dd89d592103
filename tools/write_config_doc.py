"""Writes docs/reference/config.md: every field of every section, and the kinds that have fields.

python tools/write_config_doc.py [--out FILE]
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from drlora_jax.config import FieldRow, TrainConfig, field_rows  # noqa: E402
from drlora_jax.config.kinds import KindSection  # noqa: E402
from drlora_jax.system.fields import field_types  # noqa: E402

HEAD = """# Config reference

Written by `tools/write_config_doc.py` from the fields' own declarations; `--help` lists the same. A
config file sets fields by section, `TrainSection(steps=100)`, the command line as
`train.steps=100`. A field that is marked with kinds belongs to these only: for another kind it is
refused.
"""


def page() -> str:
    rows = list(field_rows())
    parts = [HEAD]
    for section, cls in field_types(TrainConfig).items():
        own = [row for row in rows if row.name.startswith(f"{section}.")]
        parts.append(f"## {section}\n\n{cls.__doc__.splitlines()[0]}\n")
        if issubclass(cls, KindSection):
            table = [f"| `{kind}` | {_cell(each.text)} |" for kind, each in cls.kinds.items()]
            parts.append("\n".join([f"| `{section}.kind` | |", "|---|---|", *table]) + "\n")
        head = ["| field | type | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *map(_line, own)]) + "\n")
    return "\n".join(parts)


def _line(row: FieldRow) -> str:
    meaning = "<br>".join(_meanings(row))
    return f"| `{row.name}` | {_cell(row.type)} | {_default(row.default)} | {meaning} |"


def _meanings(row: FieldRow) -> Iterator[str]:
    for meaning, kinds in row.meanings:
        marked = f" ({', '.join(f'`{kind}`' for kind in kinds)})" if kinds else ""
        yield _cell(meaning) + marked


def _default(value) -> str:
    if value is None or value == ():
        return "none" if value is None else ""
    return f"`{','.join(value) if isinstance(value, tuple) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("[", "\\[").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "docs" / "reference" / "config.md"
    parser.add_argument("--out", type=pathlib.Path, default=default)
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
