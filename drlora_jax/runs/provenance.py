"""Records the versions of the packages that determine a run's numbers, and its devices."""

import importlib.metadata
import platform

import jax

import drlora_jax
from drlora_jax.allocation import Policy

PACKAGES = {"jax": "jax", "jaxlib": "jaxlib", "flax": "flax", "optax": "optax", "numpy": "numpy"}
PACKAGES |= {"orbax": "orbax-checkpoint", "transformers": "transformers"}


def made_with(mesh, layers: tuple[int, ...], policy: Policy, max_rank: int) -> dict:
    """Returns what config.json stores besides the config: versions, devices, and the initial
    ranks.
    """
    return {
        "versions": versions(),
        "devices": devices(mesh),
        "layers": list(layers),
        "max_rank": max_rank,
        "initial_ranks": policy.init().ranks_LE.tolist(),
        "budget": policy.budget,  # active ranks of a layer at the end, or of each layer
    }


def versions() -> dict[str, str]:
    found = {"drlora_jax": drlora_jax.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(each) for name, each in PACKAGES.items()}


def devices(mesh) -> dict:
    """Returns kind and number of the devices of a mesh, its axes, and its number of processes."""
    return {
        "kind": jax.devices()[0].device_kind,
        "count": int(mesh.size),
        "processes": jax.process_count(),
        "mesh": {str(name): int(size) for name, size in mesh.shape.items()},
    }
