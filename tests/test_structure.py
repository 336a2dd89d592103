"""The bars of the sources' structure; `tools/count_structure.py` says what is counted."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import count_structure  # noqa: E402  (the path is set above)

sys.path.remove(str(ROOT / "tools"))

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
