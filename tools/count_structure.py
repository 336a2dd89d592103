"""`python tools/count_structure.py [ROOT ...] [--static] [--files] [--over N]`: the structure of
source trees, a column for each; this one by default.

Counted from the sources of ROOT/drlora_jax:

* modules directly in the package: files `*.py` beside `__init__.py`, which counts as well;
* import cycles: groups of folders and of modules directly in the package that reach each other by
  the imports in their files, those inside of functions included;
* a function's lines: from `def` to its last line, docstring included, decorators not; functions
  inside of functions count both for themselves and as lines of the outer one;
* a function's arguments: those that have a name of their own, `self` and `cls` not; operations on
  arrays (three arguments or more end in the letters of a shape, as in x_TD) are left out.

Counted while a small model is trained on CPU by ROOT's own command, with all modules imported
before. A file is entered when one of its functions is called, in any thread; generated methods of
tuples and dataclasses are nobody's.

* files of a step: of DR-LoRA on a mixture of experts, while the step is compiled and from the call
  of `sharded_batch` (which calls the loader) to the return of the first `log_metrics`;
* files of an event: by the main thread, from the return of the compiled step to the return of
  `place_mask`, the first time that an event follows;
* files of other placements: that plain LoRA on a dense model enters in the first of these ways and
  that hold a placement of another kind (PLACEMENTS).
"""

import argparse
import ast
import importlib
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tempfile
import threading
from typing import NamedTuple

PACKAGE = "drlora_jax"
# Files that hold a placement of experts, now and before they were in `adapters`.
PLACEMENTS = {"expert_lora", "shared_expert_lora", "mixlora", "mola", "mixture", "linear_experts"}
COMMON = (
    "--config bundled:tiny data.eval_path= data.max_rows=64 train.batch_size=2 train.steps=10 "
    "train.sequence_length=512 run.log_every=1 run.checkpoint_every=100 mesh.data=1"
)
GROWING = (
    "adapter.targets=gate,up,down allocation.kind=dr_lora allocation.interval=2 "
    "allocation.r_init=1 allocation.r_target=2 allocation.r_max=4 allocation.p_grow=0.5 "
    "train.warmup_ratio=0.4"
)
DENSE = (
    "adapter.kind=lora adapter.targets=q,v,up allocation.kind=uniform allocation.r_target=4 "
    "allocation.r_max=4"
)


# -------------------------------------------------------------------------------------- the sources


class Function(NamedTuple):
    lines: int
    arguments: int
    where: str


def functions_of(package: pathlib.Path) -> list[Function]:
    """Lists all functions of a package, the longest first."""
    found = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = count_arguments(node.args)
                where = f"{file.relative_to(package)}:{node.lineno} {node.name}"
                found.append(Function(node.end_lineno - node.lineno + 1, count, where))
    return sorted(found, reverse=True)


def count_arguments(arguments: ast.arguments) -> int:
    """Counts the named arguments of a function; 0 for an operation on arrays."""
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    names = [each.arg for each in given if each.arg not in ("self", "cls")]
    arrays = sum(bool(re.search(r"_[A-Z]+$", name)) for name in names)
    return 0 if arrays >= 3 else len(names)


def place(module: str) -> str | None:
    """Returns the folder, or the module directly in the package, that a dotted name is in."""
    name, *parts = module.split(".")
    return parts[0] if name == PACKAGE and parts else None


def imported(tree: ast.AST) -> set[str]:
    """Returns the dotted names of what a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def graph_of(package: pathlib.Path) -> dict[str, set[str]]:
    """Returns which places import which others."""
    graph: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        module = ".".join(file.relative_to(package.parent).with_suffix("").parts)
        here = place(module.removesuffix(".__init__"))
        if here is not None:
            others = map(place, imported(ast.parse(file.read_text(encoding="utf-8"))))
            graph.setdefault(here, set()).update(set(others) - {here, None})
    return graph


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Returns the groups of places that reach each other."""

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


def static_counts(root: pathlib.Path) -> dict[str, int]:
    """Returns what is counted without running anything."""
    package = root / PACKAGE
    functions = functions_of(package)
    return {
        "modules directly in the package": len(list(package.glob("*.py"))),
        "import cycles": len(cycles(graph_of(package))),
        "lines of the longest function": functions[0].lines,
        "functions above 40 lines": sum(each.lines > 40 for each in functions),
        "functions above 60 lines": sum(each.lines > 60 for each in functions),
        "arguments of the longest list": max(each.arguments for each in functions),
    }


# ------------------------------------------------------------------------------ while it is trained


def measured_files(root: pathlib.Path) -> dict[str, list[str]]:
    """Returns which files a step, an event and a step of plain LoRA enter, by training twice."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_dense_model(folder / "dense", root / PACKAGE / "bundled" / "tiny_moe")
        growing = traced(root, folder, f"{GROWING} run.dir={folder / 'grown'}")
        dense = f"{DENSE} model.path={folder / 'dense'} run.dir={folder / 'plain'}"
        plain = traced(root, folder, dense)["step"]
    others = [each for each in plain if pathlib.Path(each).stem in PLACEMENTS]
    return {
        "files of a step": growing["step"],
        "files of an event": growing["event"],
        "files of other placements": others,
    }


def traced(root: pathlib.Path, folder: pathlib.Path, settings: str) -> dict[str, list[str]]:
    """Trains in a process of its own that runs `trace` of this file."""
    out = folder / "trace.json"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(root)
    arguments = [*COMMON.split(), *settings.split()]
    command = [sys.executable, __file__, "--trace", str(out), str(root), "--", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the training of {root} ended with {done.stderr[-2000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def write_dense_model(folder: pathlib.Path, bundled: pathlib.Path) -> None:
    """Writes a random LLaMA of two layers, with the bundled tokenizer."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    for file in bundled.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    width, hidden, vocabulary = 16, 24, 4096
    values = {"model_type": "llama", "vocab_size": vocabulary, "hidden_size": width}
    values |= {"intermediate_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2}
    values |= {"num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    shapes = {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width)}
    shapes["model.norm"] = (width,)
    for layer in range(2):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}"] = (width,)
        for name in "qkvo":
            shapes[f"model.layers.{layer}.self_attn.{name}_proj"] = (width, width)
        for name in ("gate", "up"):
            shapes[f"model.layers.{layer}.mlp.{name}_proj"] = (hidden, width)
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (width, hidden)
    draw = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": np.ones(shape, np.float32)
        if len(shape) == 1
        else (0.1 * draw.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Tracer:
    """Notes which files of a package are entered in which part of a training."""

    def __init__(self, package: pathlib.Path):
        self._package = f"{package}{os.sep}"
        self._main = threading.get_ident()
        self._in_step = False
        self.step: set[str] = set()
        self.event: set[str] = set()
        self._has_step = False
        self._since_step: set[str] | None = None

    def __call__(self, frame, event, result) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(self._package):
            self._package_event(file.removeprefix(self._package), name, event)
        elif event == "return" and name == "__call__" and file.endswith("jax/_src/stages.py"):
            import jax

            jax.block_until_ready(result)  # so that no row is kept until the next step
            self._since_step = set()

    def _package_event(self, file: str, name: str, event: str) -> None:
        if event == "call":
            if name in ("compile_step", "sharded_batch") and not self._has_step:
                self._in_step = True
            if self._in_step:
                self.step.add(file)
            if self._since_step is not None and threading.get_ident() == self._main:
                self._since_step.add(file)
        elif event == "return" and name == "compile_step":
            self._in_step = False
        elif event == "return" and name == "log_metrics":
            self._in_step, self._has_step = False, True
        elif event == "return" and name == "place_mask" and self._since_step is not None:
            self.event = self.event or set(self._since_step)


def trace(out: pathlib.Path, root: pathlib.Path, arguments: list[str]) -> None:
    """Trains under a Tracer and writes the files that it noted."""
    package = importlib.import_module(PACKAGE)
    assert pathlib.Path(package.__file__).is_relative_to(root), package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if "sandbox_" not in module.name:  # programs for another process
            try:
                importlib.import_module(module.name)
            except ImportError:  # an extra that is not installed
                continue
    tracer = Tracer(root / PACKAGE)
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    try:
        code = sys.modules[f"{PACKAGE}.train"].main(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert code == 0 and tracer.step and (tracer.event or "kind=dr_lora" not in str(arguments))
    found = {"step": sorted(tracer.step), "event": sorted(tracer.event)}
    out.write_text(json.dumps(found), encoding="utf-8")


# -------------------------------------------------------------------------------------- the command


def main(argv: list[str]) -> None:
    if argv[:1] == ["--trace"]:
        return trace(pathlib.Path(argv[1]), pathlib.Path(argv[2]), argv[4:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = pathlib.Path(__file__).parents[1]
    parser.add_argument("roots", nargs="*", type=pathlib.Path, metavar="ROOT", default=[here])
    parser.add_argument("--static", action="store_true", help="train nothing")
    parser.add_argument("--files", action="store_true", help="name the files that were entered")
    parser.add_argument("--over", type=int, metavar="N", help="list functions above N lines")
    args = parser.parse_args(argv)
    roots = [root.resolve() for root in args.roots]
    measured = [{} if args.static else measured_files(root) for root in roots]
    columns = [
        static_counts(root) | {name: len(files) for name, files in files_by_name.items()}
        for root, files_by_name in zip(roots, measured, strict=True)
    ]
    width = max(map(len, columns[0]))
    print(" " * width, *(f"{root.name:>10}" for root in roots))
    for name in columns[0]:
        print(f"{name:{width}}", *(f"{column[name]:>10}" for column in columns))
    for root, files_by_name in zip(roots, measured, strict=True):
        for name, files in files_by_name.items() if args.files else ():
            print(f"\n{root.name}, {name}:", *files, sep="\n  ")
        for each in functions_of(root / PACKAGE) if args.over else ():
            if each.lines > args.over:
                print(f"{each.lines:4} lines {each.arguments:2} arguments  {each.where}")


if __name__ == "__main__":
    main(sys.argv[1:])
