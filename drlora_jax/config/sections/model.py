"""The base model, and how it is computed."""

from dataclasses import dataclass
from typing import Literal

from drlora_jax.config.sections.section import Section, require


@dataclass(frozen=True)
class ModelSection(Section):
    path: str = "bundled:tiny_moe"  # a directory, a hub name, or bundled:NAME
    # Of base weights and activations; auto: bfloat16 on accelerators, float32 on CPUs.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "selective", "full"] = "selective"  # see drlora_jax/models/remat.py
    # Which implementation computes; see drlora_jax/ops/attention/api.py and grouped.py.
    attention: Literal["auto", "xla", "native", "chunked", "cudnn", "splash"] = "auto"
    experts: Literal["auto", "native", "block", "ragged", "mosaic", "dense", "tokamax"] = "auto"

    def check(self):
        require(bool(self.path), "model.path must name a model, got an empty string.")
