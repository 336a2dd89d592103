"""Counts what a compiled GPU module does per step, from its text: operations of matrix products by
number format, kernel launches, and calls of libraries and kernels.

The content of a loop counts once per trip. Products in known calls are counted (cuBLAS, cuDNN's
attention, grouped products of Pallas: all rows, including padding); every other call with array
arguments is named in `uncounted`, so that none is treated as free.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

import hlo_text

Array = tuple[str, tuple[int, ...]]  # number format, sizes
NARROW = ("bf16", "f16")
# Instructions that launch no kernel.
FREE = {
    "parameter",
    "constant",
    "bitcast",
    "get-tuple-element",
    "tuple",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "fusion-done",
    "copy-done",
    "async-done",
    "async-update",
}
LAYOUTS = ("bitcast", "transpose", "reshape", "copy")  # that leave numbers as they are
NO_PRODUCTS = ("Sort", "TopK", "AllocateBuffer")  # parts of names of calls that multiply nothing
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_NAMES = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")


class Instruction(NamedTuple):
    name: str
    kind: str
    results: list[Array]
    operands: list[str]
    attributes: str


class Cost(NamedTuple):
    """Of one step on one device."""

    operations: Counter  # by kind of numbers: 2 a multiplication and addition
    launches: int
    calls: Counter  # of libraries and own kernels, by target
    uncounted: Counter  # calls whose products are not counted, by target
    unknown_loops: int  # that count as if they had the trips given


def cost(text: str, unknown_trips: int = 1) -> Cost:
    """Counts the cost of a module; `unknown_trips` replaces trip counts that the compiler does not
    know.
    """
    bodies, entry = hlo_text.computations(text)
    module = {name: _instructions(lines) for name, lines in bodies.items()}
    found = Cost(Counter(), 0, Counter(), Counter(), 0)
    return _walk(module, entry, 1, unknown_trips, found)


def _instructions(lines: list[str]) -> dict[str, Instruction]:
    found = (_instruction(line) for line in lines)
    return {each.name: each for each in found if each}


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    shape, rest = _cut(match[2]) if match[2].startswith("(") else match[2].split(" ", 1)
    kind, _, tail = rest.strip().partition("(")
    inside, attributes = _cut("(" + tail)
    operands = _NAMES.findall(inside)
    return Instruction(match[1], kind, _arrays(shape), operands, attributes)


def _cut(text: str) -> tuple[str, str]:
    """Returns a text that begins with a parenthesis, cut behind the one that closes it."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: at + 1], text[at + 1 :]
    return text, ""


def _arrays(text: str) -> list[Array]:
    return [
        (kind, tuple(int(size) for size in sizes.split(",") if size))
        for kind, sizes in _ARRAY.findall(text)
    ]


def _walk(module, name: str, times: int, unknown_trips: int, found: Cost) -> Cost:
    body = module.get(name, {})
    for each in body.values():
        if each.kind in FREE:
            continue
        inner = times
        if each.kind == "while":
            trips = re.search(r'known_trip_count"?:?\s*\{"n":"?(\d+)', each.attributes)
            found = found._replace(unknown_loops=found.unknown_loops + (trips is None))
            inner = times * (int(trips[1]) if trips else unknown_trips)
        elif each.kind not in ("call", "conditional"):
            found = found._replace(launches=found.launches + times)
        for called in _called(each):
            if each.kind.startswith(("while", "call", "conditional")):
                found = _walk(module, called, inner, unknown_trips, found)
            else:
                _add_products_inside(module, called, times, found)
        _add_products(module, body, each, times, found)
    return found


def _called(each: Instruction) -> list[str]:
    """Returns the called computations: the body of a loop, the content of a fusion."""
    return re.findall(
        r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", each.attributes
    ) + [
        name.strip(" %")
        for group in re.findall(r"branch_computations=\{([^}]*)\}", each.attributes)
        for name in group.split(",")
    ]


def _add_products_inside(module, name: str, times: int, found: Cost) -> None:
    body = module.get(name, {})
    for each in body.values():
        _add_products(module, body, each, times, found)
        for called in _called(each):
            _add_products_inside(module, called, times, found)


def _add_products(module, body, each: Instruction, times: int, found: Cost) -> None:
    """Adds the operations of one instruction to the totals."""
    if each.kind == "dot":
        found.operations[_dot_kind(body, each)] += times * _dot_operations(body, each)
    if each.kind != "custom-call":
        return
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)[1]
    found.calls[target] += times
    counted = _call_operations(target, each)
    if counted is None:
        found.uncounted[target] += times
    elif counted[1]:
        found.operations[counted[0]] += times * counted[1]


def _dot_operations(body, dot: Instruction) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)[1]
    sizes = body[dot.operands[0]].results[0][1]
    depth = math.prod(sizes[int(at)] for at in contracted.split(",") if at)
    return 2 * math.prod(dot.results[0][1]) * depth


def _dot_kind(body, dot: Instruction) -> str:
    kinds = [body[name].results[0][0] for name in dot.operands[:2]]
    if set(kinds) == {"f32"} and all(_was_narrow(body, name) for name in dot.operands[:2]):
        return "f32 that were 16-bit"
    return kinds[0] if len(set(kinds)) == 1 else " x ".join(kinds)


def _was_narrow(body, name: str) -> bool:
    """Returns whether numbers were converted from 16 bits, in this computation."""
    each = body[name]
    while each.kind in LAYOUTS and each.operands[0] in body:
        each = body[each.operands[0]]
    return each.kind == "convert" and body[each.operands[0]].results[0][0] in NARROW


def _call_operations(target: str, call: Instruction) -> tuple[str, int] | None:
    """Returns number format and operations of a call; None if they are not known."""
    layouts = re.search(r"operand_layout_constraints=\{(.*?)\}, api_version", call.attributes)
    inputs = _arrays(layouts[1]) if layouts else []
    if "fmha" in target:
        return inputs[0][0], _attention_operations(target, call)
    if "cublas" in target:
        return inputs[0][0], _library_operations(call, inputs)
    if target.startswith("mosaic_gpu"):
        return _grouped_operations(call, inputs)
    if any(part in target for part in NO_PRODUCTS):
        return "", 0
    return None


def _attention_operations(target: str, call: Instruction) -> int:
    """Counts scores and values, 2 products forward and 5 backward; half of them if causal."""
    sizes = re.search(
        r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', call.attributes
    )
    scores = math.prod(int(size) for size in re.findall(r"\d+", sizes[1]))
    products = 5 if "Backward" in target else 2
    seen = 0.5 if "CAUSAL" in call.attributes else 1
    return int(2 * products * scores * call.results[0][1][-1] * seen)


def _library_operations(call: Instruction, inputs: list[Array]) -> int:
    contracted = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', call.attributes)
    depth = math.prod(inputs[0][1][int(at)] for at in re.findall(r"\d+", contracted[1]))
    return 2 * math.prod(call.results[0][1]) * depth


def _grouped_operations(call: Instruction, inputs: list[Array]) -> tuple[str, int] | None:
    """Counts [P, I] x [E, I, O] to [P, O], or [P, M] and [P, N] to [E, M, N]."""
    floats = [array for array in inputs if array[0] in (*NARROW, "f32")]
    if len(floats) != 2 or len(call.results) != 1:
        return None
    (kind, left), (_, right) = floats
    result = call.results[0][1]
    if (len(left), len(right), len(result)) == (2, 3, 2) and left[1] in right[1:]:
        return kind, 2 * result[0] * result[1] * left[1]
    if (len(left), len(right), len(result)) == (2, 2, 3) and left[0] == right[0]:
        return kind, 2 * left[0] * left[1] * right[1]
    return None
