"""How many LoRA experts each layer has, from `adapter.experts_per_layer`.

    2468          four digits, MoLA's allocations: of the quarters of the depth, input first
    5,5,4,...     one number per layer
    FILE.json     what `python -m drlora_jax.alpha MODEL --experts N --out FILE.json` wrote

Where the depth does not divide by four, layer l of L is in quarter floor(4 l / L).
"""

import json
import re

from drlora_jax.errors import UserError
from drlora_jax.system.paths import FILE, check_downloaded, kind_of, local_path

QUARTERS = 4
MOST_EXPERTS = 1024  # per layer; more can only be a slip


def experts_of_layers(section, num_layers: int) -> tuple[int, ...]:
    """Experts of every layer for a config section `adapter`; () where all have `num_experts`."""
    if section.experts_per_layer is None:
        return ()
    return resolve_counts(section.experts_per_layer, num_layers)


def resolve_counts(text: str, num_layers: int) -> tuple[int, ...]:
    """Experts of every layer.

    Raises UserError for what is none of the three forms, or does not fit the model.
    """
    if re.fullmatch(r"\d{4}", text) and num_layers > 1:
        counts = _of_quarters(text, num_layers)
    elif re.fullmatch(r"[\[(]?\s*\d{1,6}(\s*,\s*\d{1,6})*[\s,]*[\])]?", text):
        counts = [int(number) for number in re.findall(r"\d+", text)]
    else:
        counts = _read_file(text)
    if len(counts) != num_layers:
        raise UserError(
            f"adapter.experts_per_layer={text} is for {len(counts)} layers, but the model has "
            f"{num_layers}."
        )
    wrong = [layer for layer, count in enumerate(counts) if not 1 <= count <= MOST_EXPERTS]
    if wrong:
        raise UserError(
            f"adapter.experts_per_layer={text} gives layer {wrong[0]} {counts[wrong[0]]} experts; "
            f"every layer needs 1 to {MOST_EXPERTS:,}."
        )
    return tuple(counts)


def _of_quarters(digits: str, num_layers: int) -> list[int]:
    if num_layers < QUARTERS:
        raise UserError(
            f"adapter.experts_per_layer={digits} is for the four quarters of the depth, but the "
            f"model has {num_layers} layers; give one number per layer, such as 2,4."
        )
    return [int(digits[QUARTERS * layer // num_layers]) for layer in range(num_layers)]


def _read_file(path: str) -> list[int]:
    """The experts of the layers in a file of drlora_jax.alpha."""
    file = local_path(path, "adapter.experts_per_layer")
    if kind_of(file) != FILE:
        raise UserError(
            f"adapter.experts_per_layer={path}: give four digits such as 2468, one number per "
            "layer such as 2,4,4, or the FILE.json that drlora_jax.alpha wrote (this is "
            f"{kind_of(file)})."
        )
    check_downloaded(file)
    try:
        layers = json.loads(file.read_text(encoding="utf-8"))["layers"]
        by_layer = {int(each["layer"]): each["experts"] for each in layers}
        counts = [by_layer[layer] for layer in range(len(layers))]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(
            f"adapter.experts_per_layer={path} cannot be read as the --out of drlora_jax.alpha: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not all(type(count) is int for count in counts):
        raise UserError(f"adapter.experts_per_layer={path} must give whole numbers of experts.")
    return counts
