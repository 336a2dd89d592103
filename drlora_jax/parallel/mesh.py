"""Defines the device mesh and the sharding of every array on it.

Axes: `data` replicates the base model, `fsdp` shards its weights along the model dimension,
`expert` shards experts (expert parallelism), `tensor` is tensor parallelism over attention heads,
the hidden dimension of dense FFNs, the vocabulary, and further shards of experts. Rows of a batch
are sharded over (data, fsdp, expert). Masks, importance and LoRA matrices of an expert reside on
the devices of the expert. The rules are one table: the first regular expression that matches a
leaf's path decides, and every leaf must match one. A policy declares the axes of its statistics.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from drlora_jax.config import MeshSection
from drlora_jax.errors import UserError
from drlora_jax.system.numbers import ceil_div
from drlora_jax.system.text import first_line, format_bytes

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")
EXPERTS = ("expert", "tensor")

# Paths look like params/segment_0/layer_0/moe/gate_up; the first axis of a segment's leaves is
# [repeats].
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"params/embedding", PartitionSpec("tensor", "fsdp")),
    (r"params/head", PartitionSpec("fsdp", "tensor")),
    (r"params/.*/moe/(gate_up|down)", PartitionSpec(None, EXPERTS, "fsdp")),
    (r"params/.*/(o|down)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"params/.*/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"params/.*/(q|k|v|gate|up)/bias", PartitionSpec(None, "tensor")),
    (r"params/.*", PartitionSpec()),  # norms, other biases, routers, sinks
    (r"lora/.*/moe/\w+_lora/[ab]", PartitionSpec(None, EXPERTS)),
    (r"lora/.*", PartitionSpec()),  # plain LoRA, router deltas, experts that the adapter brings
    (r"mask_LER", PartitionSpec(None, EXPERTS)),
    (r"step", PartitionSpec()),
)


def count_devices() -> int:
    """Counts the devices of all processes. Raises UserError where jax finds none."""
    try:
        return jax.device_count()
    # JAX_PLATFORMS names a platform that is not available, or a device is broken.
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error) if str(error).strip() else "no backend starts"
        raise UserError(
            f"jax finds no device ({reason}); check JAX_PLATFORMS (got "
            f"{jax.config.jax_platforms!r}), the drivers, and that jax is installed for them."
        ) from error


def resolve_sizes(
    section: MeshSection, device_count: int, process_count: int = 1
) -> tuple[int, ...]:
    """Returns the sizes of AXES, with a -1 replaced by what fits. A single process may leave
    devices unused; with several processes all devices must be used.
    """
    sizes = [section.data, section.fsdp, section.expert, section.tensor]
    given = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and device_count % given == 0:
        sizes[sizes.index(-1)] = device_count // given
    if -1 in sizes or int(np.prod(sizes)) > device_count:
        raise UserError(
            f"mesh: {describe_sizes(sizes)} does not fit the {device_count} devices; change mesh.*."
        )
    if process_count > 1 and int(np.prod(sizes)) != device_count:
        raise UserError(
            f"mesh: {describe_sizes(sizes)} uses {int(np.prod(sizes))} of the {device_count} "
            f"devices of {process_count} processes; with several processes all must be used. Set "
            "one axis to -1 or start fewer processes."
        )
    return tuple(sizes)


def describe_sizes(sizes: Sequence[int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))


def make_mesh(sizes: tuple[int, ...], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of AXES over the devices of all processes, or over those of a topology.

    If the devices form several slices, which are connected by a slower network, `data` spans the
    slices, or otherwise `fsdp`. If neither can, other axes cross GPU nodes, which jax also calls
    slices; for TPUs UserError is raised.
    """
    devices = (jax.devices() if devices is None else devices)[: int(np.prod(sizes))]
    slices = count_slices(devices)
    if devices[0].platform != "tpu" and all(sizes[axis] % slices for axis in (0, 1)):
        slices = 1  # expert and tensor may span nodes, at the speed of their network
    # An axis of size 8 on a torus of 4 x 4 x 4 spans parts of two physical axes.
    options = {"allow_split_physical_axes": True}
    if slices > 1:
        across = _axis_across(slices, sizes)
        outer = [slices if axis == across else 1 for axis in AXES]
        inner = [size // factor for size, factor in zip(sizes, outer, strict=True)]
        placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **options)
    else:
        placed = mesh_utils.create_device_mesh(sizes, devices, **options)
    # jax defaults to Explicit axes, for which our code does not annotate shardings.
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices: Iterable[jax.Device]) -> int:
    """Counts TPU slices or GPU nodes, between which the network is slower; 1 if jax names none."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _axis_across(slices: int, sizes: tuple[int, ...]) -> str:
    for axis in ("data", "fsdp"):
        if sizes[AXES.index(axis)] % slices == 0:
            return axis
    raise UserError(
        f"The devices form {slices} slices: mesh.data or mesh.fsdp must be a multiple of {slices}, "
        f"got data={sizes[0]}, fsdp={sizes[1]}; expert and tensor stay within a slice."
    )


def platform_of(mesh: Mesh) -> str:
    """Returns the platform that programs over the mesh are compiled for: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def rows(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Returns the sharding of batches whose row axis comes after `leading` other axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ROWS))


def whole_shards(mesh: Mesh, row_count: int) -> int:
    """Rounds a number of rows up to a multiple of the mesh's row shards."""
    shards = int(np.prod([mesh.shape[axis] for axis in ROWS]))
    return ceil_div(row_count, shards) * shards


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def spec_for(path: str) -> PartitionSpec:
    return _rule(path)[1]


def _rule(path: str) -> tuple[str, PartitionSpec]:
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path):
            return pattern, spec
    raise AssertionError(f"no partition rule matches {path}")


def spec_of_axes(letters: str) -> PartitionSpec:
    """Returns the spec of an array with the axes `letters`: E is sharded over the experts' devices,
    the other axes are not sharded.
    """
    return PartitionSpec(*(EXPERTS if letter == "E" else None for letter in letters))


def shardings_by_axes(mesh: Mesh, tree: Any, axes: Any) -> Any:
    """Returns shardings for the statistics of a policy; without `axes` they are replicated."""
    if axes is None:
        return jax.tree.map(lambda _: replicated(mesh), tree)
    return jax.tree.map(
        lambda leaf, letters: NamedSharding(
            mesh, fitting_spec(mesh, spec_of_axes(letters), leaf.shape)
        ),
        tree,
        axes,
    )


def partition_lines(mesh: Mesh, trees: dict[str, Any], stat_axes: Any = None) -> list[str]:
    """Lists for the log how many leaves each rule matches, and their bytes on one device.

    Args:
      trees: By the root of their paths, trees whose leaves carry their sharding.
      stat_axes: The axes of the tree `stats`, as its policy declares them.
    """
    rows: dict[str, list] = {}
    for name, rule, leaf in _leaves_with_rules(trees, stat_axes):
        pattern, spec = rule
        row = rows.setdefault(pattern, [spec, 0, 0, []])
        row[1] += 1
        row[2] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        wanted = [axes for axes in spec[: len(leaf.shape)] if shards_of(mesh, axes) > 1]
        if len(wanted) > sum(shards_of(mesh, axes) > 1 for axes in leaf.sharding.spec):
            row[3].append(name)
    lines = [f"{'partition rule':<32}  {'over':<28}  {'leaves':>6}  on each device"]
    for pattern, (spec, count, size, whole) in rows.items():
        names = ((part,) if isinstance(part, str) else part or ("-",) for part in spec)
        over = ", ".join("+".join(each) for each in names) or "replicated"
        note = f"  not divisible: {', '.join(whole[:2])}" if whole else ""
        size = format_bytes(size)
        lines.append(f"{pattern:<32}  {over:<28}  {count:>6}  {size}{note}")
    return lines


def _leaves_with_rules(trees: dict[str, Any], stat_axes: Any) -> Iterator[tuple]:
    """Yields (path, (rule, spec), leaf)."""
    for root, tree in trees.items():
        leaves = jax.tree.leaves_with_path(tree)
        if root != "stats":
            rules = [_rule(_path_name(root, path)) for path, _ in leaves]
        elif stat_axes is None:
            rules = [("stats", PartitionSpec())] * len(leaves)
        else:
            axes = jax.tree.leaves(stat_axes)
            rules = [(f"stats [{', '.join(each)}]", spec_of_axes(each)) for each in axes]
        for (path, leaf), rule in zip(leaves, rules, strict=True):
            yield _path_name(root, path), rule, leaf


def shards_of(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Returns into how many shards the axes of one entry of a spec divide a dimension."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


def shardings_for(mesh: Mesh, tree: Any, root: str) -> Any:
    """Returns shardings in the structure of `tree`, without axes that do not divide a dimension."""

    def leaf(path, value):
        spec = spec_for(_path_name(root, path))
        return NamedSharding(mesh, fitting_spec(mesh, spec, value.shape))

    return jax.tree.map_with_path(leaf, tree)


def fitting_spec(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """Returns the spec without the axes that do not divide their dimension."""
    fits = [
        axes if size % shards_of(mesh, axes) == 0 else None
        for axes, size in zip(spec, shape, strict=False)
    ]
    return PartitionSpec(*fits)


def _path_name(root: str, path) -> str:
    names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
    return "/".join([root, *names]).strip("/")


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Returns `jax.ShapeDtypeStruct`s that carry their sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
