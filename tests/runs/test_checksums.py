"""Checksums are of values, not of how devices hold them: any mesh compares with any other's."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from drlora_jax.parallel import processes
from drlora_jax.runs import checksums

SHAPE = (4, 8, 2)
MESHES = [(1, 1), (8, 1), (1, 8), (2, 2), (4, 2), (2, 4)]
SPECS = [(), (None, "a"), (None, "a", "b"), ("b", "a"), (None, ("a", "b"))]


def place(values, mesh, spec):
    devices = np.array(jax.devices()[: mesh[0] * mesh[1]]).reshape(mesh)
    sharding = NamedSharding(Mesh(devices, ("a", "b")), PartitionSpec(*spec))
    return jax.device_put(values, sharding)


def fits(mesh, spec) -> bool:
    sizes = dict(zip("ab", mesh, strict=True))
    parts = [np.prod([sizes[name] for name in axis or ()], dtype=int) for axis in spec]
    return all(size % count == 0 for size, count in zip(SHAPE, parts, strict=False))


LAYOUTS = [(mesh, spec) for mesh in MESHES for spec in SPECS if fits(mesh, spec)]
VALUES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_every_mesh_compares_with_every_other(saved):
    digests = checksums.hash_arrays({"x": place(VALUES, *saved)})
    wrong = VALUES.copy()
    wrong[-1, -1, -1] = np.nextafter(wrong[-1, -1, -1], np.float32(np.inf))
    for layout in LAYOUTS:
        assert checksums.find_mismatch({"x": place(VALUES, *layout)}, digests) is None
        assert checksums.find_mismatch({"x": place(wrong, *layout)}, digests) == "x"


def test_each_part_has_one_checksum():
    digests = checksums.hash_arrays({"x": place(VALUES, (4, 2), (None, "a"))})["x"]
    assert list(digests) == [f"0:4,{start}:{start + 2},0:2" for start in (0, 2, 4, 6)]
    whole = checksums.hash_arrays({"x": place(VALUES, (4, 2), ())})["x"]
    assert list(whole) == ["0:4,0:8,0:2"]


@pytest.mark.parametrize("dtype", ["int8", "bool", "float16", ml_dtypes.bfloat16, "int32"])
def test_every_dtype_and_scalars(dtype):
    tree = {"x": jax.numpy.asarray(VALUES > 0, dtype), "step": jax.numpy.asarray(1, dtype)}
    digests = checksums.hash_arrays(tree)
    assert checksums.find_mismatch(tree, digests) is None
    changed = tree | {"step": jax.numpy.asarray(0, dtype)}
    assert checksums.find_mismatch(changed, digests) == "step"


def test_every_copy_of_a_part_is_compared():
    good = place(VALUES, (8, 1), ())
    digests = checksums.hash_arrays({"x": good})
    parts = [np.array(shard.data) for shard in good.addressable_shards]
    parts[5][0, 0, 0] += 1
    placed = [jax.device_put(part, device) for part, device in zip(parts, jax.devices())]  # noqa: B905
    bad = jax.make_array_from_single_device_arrays(SHAPE, good.sharding, placed)
    assert checksums.find_mismatch({"x": bad}, digests) == "x"


def test_missing_parts_are_a_mismatch():
    tree = {"x": place(VALUES, (4, 2), (None, "a"))}
    digests = checksums.hash_arrays(tree)
    assert checksums.find_mismatch(tree, {}) == "x"
    digests["x"].popitem()
    assert checksums.find_mismatch(tree, digests) == "x"


def test_an_array_that_has_to_be_gathered(monkeypatch):
    """As where some process holds a part of a saved part only."""
    gathered = []
    monkeypatch.setattr(checksums, "_cuts_a_block", lambda *_: True)
    monkeypatch.setattr(
        processes, "to_host", lambda leaf: gathered.append(leaf) or np.asarray(leaf)
    )
    digests = checksums.hash_arrays({"x": place(VALUES, (1, 1), ())})
    assert checksums.find_mismatch({"x": place(VALUES, (8, 1), (None, "a"))}, digests) is None
    assert len(gathered) == 1


class Spread:
    """Eight devices of two processes, each with half of an axis of eight."""

    is_fully_addressable = False

    def __init__(self, per_process: int):
        self.per_process = per_process

    def devices_indices_map(self, shape):
        class Device:
            def __init__(self, number):
                self.process_index = number // 4

        step = 8 // (2 * self.per_process)
        return {Device(n): (slice(n // 4 * 4, n // 4 * 4 + step),) for n in (0, 4)}


class Leaf:
    shape, sharding = (8,), Spread(1)


@pytest.mark.parametrize(
    "block, is_cut", [((0, 4), False), ((4, 8), False), ((0, 2), False), ((2, 6), True)]
)
def test_which_parts_are_cut(block, is_cut):
    """Parts lie inside of what a process holds, or across two of them."""
    assert checksums._cuts_a_block(Leaf(), {(block,): ""}) is is_cut


def test_sealed_values():
    values = {"tokens": 12, "eval_loss": 1.25, "arrays": {"x": {"0:4": "ab"}}, "run_id": None}
    sealed = checksums.seal(values)
    assert checksums.is_sealed(sealed)
    for name in values:
        assert not checksums.is_sealed(sealed | {name: 13})
    assert not checksums.is_sealed(sealed | {"more": 1}) and not checksums.is_sealed(values)
