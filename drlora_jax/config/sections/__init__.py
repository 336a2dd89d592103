"""The sections of a config, a file each, checked where they are made."""

from drlora_jax.config.sections.adapter import AdapterSection
from drlora_jax.config.sections.allocation import AllocationSection
from drlora_jax.config.sections.data import DataSection
from drlora_jax.config.sections.mesh import MeshSection
from drlora_jax.config.sections.model import ModelSection
from drlora_jax.config.sections.run import RunSection
from drlora_jax.config.sections.train import TrainSection

__all__ = [
    "AdapterSection",
    "AllocationSection",
    "DataSection",
    "MeshSection",
    "ModelSection",
    "RunSection",
    "TrainSection",
]
