"""Checksums of a checkpoint, computed from the values written and compared with those restored.

An array is saved in blocks, one per shard of the mesh, and each block has the xxh3_128 of its bytes
under the index range that it covers. The ranges, not the mesh, define what was hashed, so any other
mesh and number of processes can verify it: what a process holds of an array is cut or assembled to
the saved blocks. If some process holds only a part of a block, the array is first gathered to all
hosts.

The host values beside the arrays are sealed: one more checksum covers all of them, including the
checksums of the arrays. All this detects faults of disks and memory, not attackers.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import xxhash

from drlora_jax.parallel import processes

SEAL = "xxh3_128"
Ranges = tuple[tuple[int, int], ...]  # (start, stop) by axis


def leaf_name(path) -> str:
    """Returns a leaf's path as text, the same for dicts, tuples and named tuples."""
    return "/".join(
        str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
        for part in path
    )


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON values with their own checksum added."""
    return {**values, SEAL: _hash_json(values)}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Returns whether the values have a checksum that matches."""
    rest = {name: value for name, value in values.items() if name != SEAL}
    return values.get(SEAL) == _hash_json(rest)


def hash_arrays(tree: Any) -> dict[str, dict[str, str]]:
    """Returns the checksums of all blocks of all arrays, equal on every process: {leaf: {ranges:
    digest}}.

    A block that several devices hold is hashed once, on the device from which Orbax writes it.
    """
    own = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        own[leaf_name(path)] = {
            _key(_ranges(shard.index, leaf.shape)): _hash(np.asarray(shard.data))
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        }
    merged: dict[str, dict[str, str]] = {name: {} for name in own}
    for text in processes.all_texts(json.dumps(own)):
        for name, blocks in json.loads(text).items():
            merged[name] |= blocks
    return merged


def find_mismatch(tree: Any, saved: Mapping[str, Mapping[str, str]]) -> str | None:
    """Returns the first array of which this process holds something different from what was saved;
    None if all match.

    All processes must call it: arrays are gathered if the meshes make it necessary.
    """
    wrong = []  # no early return: the others would wait for this process
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = leaf_name(path)
        blocks = {_parse(key): digest for key, digest in saved.get(name, {}).items()}
        if sum(map(_size, blocks)) != leaf.size:
            wrong.append(name)
            continue
        held = _held(leaf, blocks)
        if not all(_is_intact(held, block, digest) for block, digest in blocks.items()):
            wrong.append(name)
    return wrong[0] if wrong else None


def _held(leaf: jax.Array, blocks: Mapping[Ranges, str]) -> list[tuple[Ranges, Any]]:
    """Returns what this process holds of an array, by ranges; all of it if it had to be
    gathered.
    """
    if _cuts_a_block(leaf, blocks):
        return [(tuple((0, size) for size in leaf.shape), processes.to_host(leaf))]
    return [(_ranges(shard.index, leaf.shape), shard.data) for shard in leaf.addressable_shards]


def _cuts_a_block(leaf: jax.Array, blocks: Mapping[Ranges, str]) -> bool:
    """Returns whether some process holds a part of a block but not all of it; equal on all
    processes.

    Parts on different devices are equal or disjoint.
    """
    if leaf.sharding.is_fully_addressable:
        return False
    parts: dict[int, set[Ranges]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        parts.setdefault(device.process_index, set()).add(_ranges(index, leaf.shape))
    return any(
        sum(_size(_overlap(part, block)) for part in own) not in (0, _size(block))
        for own, block in itertools.product(parts.values(), blocks)
        if block not in own
    )


def _is_intact(held: list[tuple[Ranges, Any]], block: Ranges, digest: str) -> bool:
    """Returns whether every local copy of a block matches its checksum."""
    copies = [
        np.asarray(data)[_slices(block, ranges)]
        for ranges, data in held
        if _overlap(ranges, block) == block
    ]
    return all(_hash(copy) == digest for copy in copies or _put_together(held, block))


def _put_together(held: list[tuple[Ranges, Any]], block: Ranges) -> Iterator[np.ndarray]:
    """Yields the block assembled from its parts on several devices; nothing if no part is here."""
    parts = [(_overlap(ranges, block), ranges, data) for ranges, data in held]
    parts = [part for part in parts if _size(part[0])]
    if parts:
        whole = np.empty([stop - start for start, stop in block], parts[0][2].dtype)
        for common, ranges, data in parts:
            whole[_slices(common, block)] = np.asarray(data)[_slices(common, ranges)]
        yield whole


def _hash(array: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _hash_json(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


# ------------------------------------------------------------------------------------------- ranges


def _ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> Ranges:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _overlap(one: Ranges, other: Ranges) -> Ranges:
    pairs = zip(one, other, strict=True)
    return tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in pairs)


def _size(ranges: Ranges) -> int:
    return math.prod(max(stop - start, 0) for start, stop in ranges)


def _slices(ranges: Ranges, within: Ranges) -> tuple[slice, ...]:
    """Returns an index that selects `ranges` from what `within` covers."""
    pairs = zip(ranges, within, strict=True)
    return tuple(slice(own[0] - outer[0], own[1] - outer[0]) for own, outer in pairs)


def _key(ranges: Ranges) -> str:
    return ",".join(f"{start}:{stop}" for start, stop in ranges)


def _parse(key: str) -> Ranges:
    if not key:  # a scalar
        return ()
    pairs = (part.partition(":") for part in key.split(","))
    return tuple((int(start), int(stop)) for start, _, stop in pairs)
