"""Reads collectives from the text of a compiled module: kind, shape, and executions per step.

A collective inside a loop counts once per trip, as far as the compiler knows the trip count.
"""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "send",  # to another slice
)
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations|async_computation)=\{?([^,}\s]+)")
_TRIPS = re.compile(r'known_trip_count"?:?\s*\{"n":"?(\d+)')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    shape: str  # of the result, such as bf16[8,4096]
    times: int  # per step
    origin: str  # the operation it comes from

    @property
    def bytes(self) -> int:
        """Of one result."""
        return shape_bytes(self.shape)


def shape_bytes(shape: str) -> int:
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8)
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def collectives(text: str) -> list[Collective]:
    """Lists the collectives of the whole module, in program order of the computations."""
    bodies, entry = computations(text)
    found: list[Collective] = []
    _walk(bodies, entry, 1, found)
    return found


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = bodies.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return bodies, entry


def _walk(bodies, name: str, times: int, found: list[Collective]) -> None:
    for line in bodies.get(name, ()):
        match = _COLLECTIVE.search(line)
        if match:
            each = _collective(match, line, times)
            # A reduce-scatter that the TPU compiler made one program of: its shape is the input's.
            is_scatter = "all-reduce-scatter" in name
            found.append(each._replace(kind="reduce-scatter") if is_scatter else each)
            continue
        inner = times * _trips(bodies, line) if " while(" in line else times
        for called in _CALLED.findall(line):
            _walk(bodies, called.lstrip("%"), inner, found)


def _trips(bodies, line: str) -> int:
    """Returns the trips of a loop as the compiler noted them, or the bound of its counter; 1 if
    neither is known.
    """
    noted = _TRIPS.search(line)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    bounds = [
        int(constant[1])
        for each in bodies.get(condition[1] if condition else "", ())
        if (constant := re.search(r"= s32\[\]\S* constant\((\d+)\)", each))
    ]
    return bounds[0] if len(bounds) == 1 else 1


def _collective(match, line: str, times: int) -> Collective:
    arrays = [f"{kind}[{sizes}]" for kind, sizes in _ARRAY.findall(match[1])]
    if match[2] == "send":  # beside it a number and a token
        arrays = arrays[:1]
    elif match[2] == "ragged-all-to-all":  # the buffer, which is for the worst case
        arrays = [max(arrays, key=shape_bytes)]
    elif match[3] and len(arrays) > 1:  # started: the operands come before the results
        arrays = arrays[len(arrays) // 2 :] if match[2] == "all-reduce" else arrays[-1:]
    origin = re.search(r'op_name="([^"]*)"|_xla_megascale_transfer_type="([^"]*)"', line)
    return Collective(match[2], " ".join(arrays), times, (origin[1] or origin[2]) if origin else "")


class Limits(NamedTuple):
    """Arrays that must not be communicated between chips; sizes in elements."""

    local_experts: int  # experts of one shard
    expert_shapes: tuple[tuple[int, int], ...]  # of one expert's weights, whole or cut by fsdp
    vocab: int
    head: int
    global_lora: set[tuple[int, ...]]  # LoRA matrices of all experts, if sharded


def _holds(shape: tuple[int, ...], matrix: tuple[int, int]) -> bool:
    rest = list(shape)
    for size in matrix:
        if size not in rest:
            return False
        rest.remove(size)
    return True


def forbidden(each: Collective, limits: Limits) -> str | None:
    """Describes what a collective moves that it must not move; returns None if it is allowed."""
    for _, sizes in _ARRAY.findall(each.shape):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        count = math.prod(shape)
        for matrix in limits.expert_shapes:
            if _holds(shape, matrix) and count > limits.local_experts * math.prod(matrix):
                return "more than one layer's experts of one shard"
        if len(shape) > 1 and limits.vocab in shape and count != limits.head:
            return "logits"
        squeezed = tuple(size for size in shape if size != 1)
        if squeezed in limits.global_lora:
            return "LoRA matrices of all experts"
    return None
