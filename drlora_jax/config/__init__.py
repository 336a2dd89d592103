"""The config of a run: frozen dataclasses, checked when they are built.

A config file is Python with one function, `get_config() -> TrainConfig`; `load_config` runs it and
applies `section.field=value` overrides. Every field is typed; unknown names, wrong types, values
out of range and contradictions are refused here, before anything touches a device. A run stores its
config as data (`to_dict`) and restores it as data (`from_dict`): a run directory is never executed.
"""

from drlora_jax.config.load import (
    PLACES,
    FieldRow,
    all_fields,
    apply_overrides,
    config_file,
    field_rows,
    from_dict,
    from_flat,
    load_config,
    own_fields,
    settled,
    to_dict,
)
from drlora_jax.config.schema import (
    AdapterSection,
    AllocationSection,
    DataSection,
    MeshSection,
    ModelSection,
    RunSection,
    TrainConfig,
    TrainSection,
)

__all__ = [
    "PLACES",
    "AdapterSection",
    "AllocationSection",
    "DataSection",
    "FieldRow",
    "MeshSection",
    "ModelSection",
    "RunSection",
    "TrainConfig",
    "TrainSection",
    "all_fields",
    "apply_overrides",
    "config_file",
    "field_rows",
    "from_dict",
    "from_flat",
    "load_config",
    "own_fields",
    "settled",
    "to_dict",
]
