"""Who imports whom, by folder of the package, as the sources say it."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "drlora_jax"
ENTRY = "entry points"


def place(module: str) -> str | None:
    """The folder, or the module directly in the package, that a dotted name lies in."""
    name, *parts = module.split(".")
    return parts[0] if name == "drlora_jax" and parts else None


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of the modules that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def graph_of(package: pathlib.Path) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        module = ".".join(file.relative_to(package.parent).with_suffix("").parts)
        here = place(module.removesuffix(".__init__"))
        if here is not None:
            others = map(place, imported(ast.parse(file.read_text(encoding="utf-8"))))
            graph.setdefault(here, set()).update(set(others) - {here, None})
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of places that reach each other."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reach = {each: reached(each) for each in graph}
    groups = {
        frozenset(other for other in reach[each] if each in reach.get(other, ())) for each in graph
    }
    return [set(group) for group in groups if group]


def layers() -> dict[str, int]:
    """The layer of every place, as docs/design.md states it."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("## Folders")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", table, re.MULTILINE)
    found = {place: int(layer) for layer, places in rows for place in re.findall(r"\w+", places)}
    return found | {ENTRY: int(rows[-1][0])}


def test_no_folders_import_in_a_circle():
    graph = graph_of(PACKAGE)
    assert {"models", "training", "train"} <= graph.keys()
    assert circles(graph) == []


def test_places_import_from_the_layers_below_their_own():
    stated, graph = layers(), graph_of(PACKAGE)
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
    assert circles(graph) == expected
