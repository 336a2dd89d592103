"""Where tests are and what they share, as the sources say it."""

import ast
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "drlora_jax"
# Mistakes and their messages, stored results, files as users bring them, and what tests share.
OTHERS = {"error_cases", "oracles", "street", "support"}
MODULES = sorted(TESTS.rglob("test_*.py"))


def folders(parent: pathlib.Path) -> set[str]:
    return {file.parent.name for file in parent.glob("*/__init__.py")}


def imported(source: str) -> set[str]:
    """Dotted names that a module imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules_in(names: set[str]) -> list[str]:
    """The test modules among dotted names, whatever folder they are imported from."""
    stems = {module.stem for module in MODULES}
    return sorted(name for name in names if stems & set(name.split(".")))


def test_folders_mirror_those_of_the_package():
    assert folders(TESTS) == folders(PACKAGE) | OTHERS


@pytest.mark.parametrize("folder", sorted(folders(PACKAGE)))
def test_a_folder_tests_its_folder_of_the_package(folder):
    sources = [file.read_text(encoding="utf-8") for file in (TESTS / folder).glob("test_*.py")]
    names = set().union(*map(imported, sources))
    assert any(name.startswith(f"drlora_jax.{folder}.") for name in names)


def test_no_file_imports_a_test_module():
    found = {
        str(file.relative_to(TESTS)): modules_in(imported(file.read_text(encoding="utf-8")))
        for file in TESTS.rglob("*.py")
    }
    assert {file: names for file, names in found.items() if names} == {}


def test_an_import_of_a_test_module_would_be_found():
    source = "def f():\n    import numpy, test_cli\n    from tests.ops.test_native import x\n"
    names = modules_in(imported(source))
    assert names == ["test_cli", "tests.ops.test_native", "tests.ops.test_native.x"]
