"""The structure of the sources: bars that are held, and the layers of the package.

`tools/count_structure.py` says what is counted.
"""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import count_structure  # noqa: E402  (the path is set above)

sys.path.remove(str(ROOT / "tools"))

PACKAGE = ROOT / "drlora_jax"
ENTRY = "entry points"
BARS = {
    "modules directly in the package": 15,
    "import cycles": 0,
    "lines of the longest function": 98,
    "functions above 40 lines": 6,
    "functions above 60 lines": 1,
    "arguments of the longest list": 8,
}


def test_the_sources_stay_below_the_bars():
    counted = count_structure.static_counts(ROOT)
    assert counted.keys() == BARS.keys()
    assert {name: count for name, count in counted.items() if count > BARS[name]} == {}


def test_functions_are_measured_as_stated(tmp_path):
    source = '''
class Thing:
    @property
    def value(self, first, /, second, *rest, third=3, **more):
        """Returns a value."""

        def inner():
            return first

        return inner
'''
    (tmp_path / "module.py").write_text(source)
    outer, inner = count_structure.functions_of(tmp_path)
    assert outer == (7, 3, "module.py:4 value")
    assert inner == (2, 0, "module.py:7 inner")


def test_arguments_of_operations_on_arrays_are_not_counted():
    for signature, count in {"x_TD, w_DF, *, mask_T, scale": 0, "x_TD, w_DF, scale": 3}.items():
        [function] = ast.parse(f"def f({signature}): pass").body
        assert count_structure.count_arguments(function.args) == count


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("import drlora_jax.train", {"train"}),
        ("from drlora_jax import cli", {"cli"}),
        ("def f():\n    from drlora_jax.data.loader import Loader", {"data"}),
        ("import numpy", {None}),
    ],
)
def test_imports_are_found(line, names):
    assert set(map(count_structure.place, count_structure.imported(ast.parse(line)))) == names


@pytest.mark.slow
def test_a_step_and_an_event_enter_few_files():
    files = count_structure.measured_files(ROOT)
    assert {"train.py", "training/step.py", "data/loader.py"} <= set(files["files of a step"])
    assert {"training/growth.py", "allocation/dr_lora.py"} <= set(files["files of an event"])
    assert len(files["files of a step"]) <= 33
    assert len(files["files of an event"]) <= 12
    assert files["files of other placements"] == []


# ------------------------------------------------------------------------------------------ layers


def layers() -> dict[str, int]:
    """The layer of every place, as docs/design.md states it."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("## Folders")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", table, re.MULTILINE)
    found = {place: int(layer) for layer, places in rows for place in re.findall(r"\w+", places)}
    return found | {ENTRY: int(rows[-1][0])}


def test_no_folders_import_in_a_circle():
    graph = count_structure.graph_of(PACKAGE)
    assert {"models", "training", "train"} <= graph.keys()
    assert count_structure.cycles(graph) == []


def test_places_import_from_the_layers_below_their_own():
    stated, graph = layers(), count_structure.graph_of(PACKAGE)
    folders = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert folders <= stated.keys() and len(folders) > 10
    above = {
        (place, other)
        for place, others in graph.items()
        for other in others
        if stated.get(other, stated[ENTRY]) >= stated.get(place, stated[ENTRY] + 1)
    }
    assert above == set()


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [{"a", "b", "c"}]),
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
    ],
)
def test_circles_are_found(graph, expected):
    assert count_structure.cycles(graph) == expected
