"""The sections of a config, a file each, checked where they are made."""

from drlora_jax.config_sections.adapter import AdapterSection
from drlora_jax.config_sections.allocation import AllocationSection
from drlora_jax.config_sections.data import DataSection
from drlora_jax.config_sections.mesh import MeshSection
from drlora_jax.config_sections.model import ModelSection
from drlora_jax.config_sections.run import RunSection
from drlora_jax.config_sections.train import TrainSection

__all__ = [
    "AdapterSection",
    "AllocationSection",
    "DataSection",
    "MeshSection",
    "ModelSection",
    "RunSection",
    "TrainSection",
]
