"""What tells users of config fields: `--help` and the reference, from the fields' declarations."""

import importlib.util
import pathlib

import pytest

from drlora_jax import cli
from drlora_jax.adapters.registry import PLACEMENTS
from drlora_jax.config import AdapterSection, AllocationSection, field_rows

ROOT = pathlib.Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("config_doc", ROOT / "tools" / "write_config_doc.py")


def test_the_reference_is_up_to_date():
    tool = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(tool)
    file = ROOT / "docs" / "reference" / "config.md"
    assert file.read_text(encoding="utf-8") == tool.page(), "run tools/write_config_doc.py"


def test_help_lists_every_field_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit):
        cli.parse_arguments("train", "", ["--help"])
    lines = capsys.readouterr().out.splitlines()
    for row in field_rows():
        at = lines.index(f"  {row.name} ({row.type}) = {row.default!r}")
        for meaning, kinds in row.meanings:
            at += 1
            of = f" [{', '.join(kinds)}]" if kinds else ""
            assert lines[at] == f"      {meaning}{of}"
    assert "      share of a layer's experts that get ranks [moe_sieve]" in lines


def test_every_placement_says_what_it_does():
    for name, options in AdapterSection.kinds.items():
        placement = PLACEMENTS[name]
        assert placement.kind == name and placement.options is options and options.text


def test_every_policy_says_what_it_does():
    for name, policy in AllocationSection.kinds.items():
        assert policy.name == name and policy.text and policy.__module__.count(".") == 2
