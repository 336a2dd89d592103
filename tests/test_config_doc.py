"""What tells users of config fields: `--help` and the reference, from the fields' declarations."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from drlora_jax import cli
from drlora_jax.config import AllocationSection, field_rows

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


def test_every_policy_says_what_it_does():
    for name, policy in AllocationSection.kinds.items():
        assert policy.name == name and policy.text and policy.__module__.count(".") == 2


def test_a_config_is_read_without_jax():
    """So that a mistake in it is found at once."""
    code = "import sys, drlora_jax.config; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
