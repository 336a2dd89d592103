"""The device mesh and where every array lies on it.

Axes: `data` replicates, `fsdp` shards base weights along their width, `expert` shards experts,
  `tensor` is reserved. Rows of a batch are sharded over (data, fsdp, expert). Masks, importance and
  factors of an expert lie with the expert. The rules are one table: the first regular expression
  that matches a leaf's path decides, and every leaf must match one.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from drlora_jax.config import MeshSection
from drlora_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")

# Paths look like params/segment_0/layer_0/moe/gate_up; leaves of a segment lead with [repeats].
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"params/embedding", PartitionSpec(None, "fsdp")),
    (r"params/head", PartitionSpec("fsdp", None)),
    (r"params/.*/moe/(gate_up|down)", PartitionSpec(None, "expert", "fsdp")),
    (r"params/.*/kernel", PartitionSpec(None, "fsdp")),
    (r"params/.*", PartitionSpec()),  # norms, biases, routers, sinks
    (r"lora/.*/moe/\w+_lora/[ab]", PartitionSpec(None, "expert")),
    (r"lora/.*", PartitionSpec()),  # plain LoRA, router deltas
    (r"mask_LER", PartitionSpec(None, "expert")),
    (r"stats/\w+_LE", PartitionSpec(None, "expert")),
    (r"stats/\w+_LPER", PartitionSpec(None, None, "expert")),
    (r"step|stats(/.*)?", PartitionSpec()),
)


def resolve_sizes(section: MeshSection, device_count: int) -> tuple[int, ...]:
    """The sizes of AXES with a -1 filled in; sizes without -1 may leave devices unused."""
    sizes = [section.data, section.fsdp, section.expert, section.tensor]
    given = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and device_count % given == 0:
        sizes[sizes.index(-1)] = device_count // given
    if -1 in sizes or int(np.prod(sizes)) > device_count:
        shape = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"mesh: {shape} does not fit the {device_count} devices there are; change mesh.*."
        )
    return tuple(sizes)


def make_mesh(sizes: tuple[int, ...], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of AXES over this process's devices, or over those of a described topology."""
    devices = (jax.devices() if devices is None else devices)[: int(np.prod(sizes))]
    # An axis of 8 on a torus of 4 x 4 x 4 is part of two of its axes.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # jax defaults to Explicit axes, which our code does not write shardings for.
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform_of(mesh: Mesh) -> str:
    """cpu, gpu or tpu: what programs over the mesh are compiled for."""
    return mesh.devices.flat[0].platform


def rows(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Sharding of batches: the row axis comes after `leading` other axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ROWS))


def whole_shards(mesh: Mesh, row_count: int) -> int:
    """That many rows, rounded up to what divides among the mesh's row shards."""
    shards = int(np.prod([mesh.shape[axis] for axis in ROWS]))
    return -(-row_count // shards) * shards


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def spec_for(path: str) -> PartitionSpec:
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path):
            return spec
    raise AssertionError(f"no partition rule matches {path}")


def shardings_for(mesh: Mesh, tree: Any, root: str) -> Any:
    """A tree like `tree` of shardings; axes that do not divide a dimension are left out."""

    def leaf(path, value):
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        spec = spec_for("/".join([root, *names]).strip("/"))
        spec = spec[: len(value.shape)]
        fits = [
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, value.shape, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map_with_path(leaf, tree)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s that carry their sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
