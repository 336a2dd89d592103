"""Rules for the values of a config, inside a section and across sections.

Rules with one condition each form tables, checked from top to bottom: the first violated rule is
reported. The rules of a policy or placement are in its own file.
"""

import datetime
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from drlora_jax.allocation.base import LARGEST_RANK
from drlora_jax.errors import UserError
from drlora_jax.system.fields import at_most, field_types, fraction, positive, require

LARGEST_BATCH = 2**31 - 1  # tokens: positions are 32-bit on devices


class Rule(NamedTuple):
    """A rule of a section, or of a whole config."""

    holds: Callable[[Any], bool]
    message: Callable[[Any], str]


def check_rules(rules: Sequence[Rule], value: Any) -> None:
    for rule in rules:
        if not rule.holds(value):
            raise UserError(rule.message(value))


# ---------------------------------------------------------------------------------- inside sections


def check_run(run) -> None:
    require(bool(run.dir), "run.dir must name a directory, got an empty string.")
    in_range = 0 <= run.seed < 2**32
    require(in_range, f"run.seed must be 0 or more and below 2**32, got {run.seed}.")
    names = ("log_every", "checkpoint_every", "keep_last", "heartbeat_timeout", "stall_timeout")
    positive("run", {name: getattr(run, name) for name in names})


def check_model(model) -> None:
    require(bool(model.path), "model.path must name a model, got an empty string.")


def check_data(data) -> None:
    if data.max_rows is not None:
        positive("data", {"max_rows": data.max_rows})
    is_fine = data.date == "auto" or _is_date(data.date)
    require(is_fine, f"data.date must be auto or YYYY-MM-DD, got {data.date}.")
    require(
        data.too_long != "split" or data.format == "text",
        'data.too_long="split" cuts documents, so it needs data.format="text", '
        f'got data.format="{data.format}".',
    )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def check_train(train) -> None:
    steps, epochs = train.steps, train.epochs
    require(
        (steps is None) != (epochs is None),
        f"Set exactly one of train.steps and train.epochs, got {steps} and {epochs}.",
    )
    counts = ("steps", "epochs", "batch_size", "micro_batches", "sequence_length")
    counts += ("eval_every", "eval_batches")
    given = {name: getattr(train, name) for name in counts}
    positive("train", {name: value for name, value in given.items() if value is not None})
    rates = ("learning_rate", "epsilon", "b_learning_rate_ratio")
    positive("train", {name: getattr(train, name) for name in rates})
    fraction("train", {n: getattr(train, n) for n in ("warmup_ratio", "beta1", "beta2")})
    for name in ("weight_decay", "balance_loss", "z_loss"):
        value = getattr(train, name)
        require(value >= 0, f"train.{name} must be 0 or more, got {value}.")
    require(
        train.max_grad_norm is None or train.max_grad_norm > 0,
        f"train.max_grad_norm must be greater than 0 or None, got {train.max_grad_norm}.",
    )
    require(
        train.batch_size % train.micro_batches == 0,
        f"train.batch_size ({train.batch_size}) must be a multiple of train.micro_batches "
        f"({train.micro_batches}).",
    )
    tokens = train.batch_size * train.sequence_length
    at_most("train.batch_size * train.sequence_length", tokens, LARGEST_BATCH, " tokens")


def check_mesh(mesh) -> None:
    sizes = (mesh.data, mesh.fsdp, mesh.expert, mesh.tensor)
    require(
        all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
        "mesh sizes must be positive, and at most one may be -1 (the remaining devices), got "
        f"{', '.join(map(str, sizes))}.",
    )


def check_allocation(allocation) -> None:
    at_most("allocation.r_target", allocation.r_target, LARGEST_RANK)
    at_most("allocation.r_max", allocation.r_max, LARGEST_RANK)


def check_adapter(adapter) -> None:
    check_rules(ADAPTER_TARGETS, adapter)
    positive("adapter", {"scale": adapter.scale})
    fraction("adapter", {"dropout": adapter.dropout})
    if adapter.rank is not None:
        positive("adapter", {"rank": adapter.rank})
    at_most("adapter.rank", adapter.rank or 0, LARGEST_RANK)


ADAPTER_TARGETS = (
    Rule(
        lambda a: bool(a.targets),
        lambda a: "adapter.targets must name at least one projection, got none.",
    ),
    Rule(
        lambda a: "gate_up" not in a.targets or not {"gate", "up"} & set(a.targets),
        lambda a: (
            f"adapter.targets must name either gate_up or gate and up, got {', '.join(a.targets)}."
        ),
    ),
)


# ---------------------------------------------------------------------------------- across sections


def check_together(config) -> None:
    """Checks that every section has its class, then the rules across sections."""
    for name, cls in field_types(type(config)).items():
        value = getattr(config, name)
        require(isinstance(value, cls), f"{name} must be a {cls.__name__}, got {value!r}.")
    check_rules(TOGETHER, config)


def _refusal(config) -> str | None:
    """Returns why the policy does not fit the placement; None if it does."""
    return config.allocation.own.refuses(config.allocation, config.adapter)


TOGETHER = (
    Rule(
        lambda c: c.adapter.kind != "lora" or not c.allocation.own.needs_experts,
        lambda c: (
            "adapter.kind=lora has no experts to share ranks among: "
            f"set allocation.kind=uniform, got {c.allocation.kind}."
        ),
    ),
    Rule(lambda c: _refusal(c) is None, lambda c: _refusal(c)),
    Rule(
        lambda c: c.adapter.experts_per_layer is None or not c.allocation.own.shares_among_layers,
        lambda c: (
            f"allocation.kind={c.allocation.kind} distributes ranks or experts over layers with "
            "equal numbers of experts, but adapter.experts_per_layer makes them different. Use "
            "one of the two."
        ),
    ),
)
