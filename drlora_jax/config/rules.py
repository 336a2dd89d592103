"""What the values of a config may be: inside a section, and across sections.

Rules with one condition each are tables, checked from top to bottom: the first one that is broken
is the message. What a policy allows is in its own file.
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


# --------------------------------------------------------------------------------- inside sections


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
        f"mesh sizes must be positive, at most one -1 (the rest of the devices), got "
        f"{', '.join(map(str, sizes))}.",
    )


def check_allocation(allocation) -> None:
    at_most("allocation.r_target", allocation.r_target, LARGEST_RANK)
    at_most("allocation.r_max", allocation.r_max, LARGEST_RANK)


def check_adapter(adapter) -> None:
    check_rules(ADAPTER_TARGETS, adapter)
    positive("adapter", {"scale": adapter.scale})
    fraction("adapter", {n: getattr(adapter, n) for n in ("dropout", "factor_dropout")})
    for name in ("expert_scale", "expert_dropout"):
        _check_beside_experts(adapter, name)
    if adapter.expert_scale is not None:
        positive("adapter", {"expert_scale": adapter.expert_scale})
    fraction("adapter", {"expert_dropout": adapter.expert_dropout or 0.0})
    if adapter.rank is not None:
        positive("adapter", {"rank": adapter.rank})
    at_most("adapter.rank", adapter.rank or 0, LARGEST_RANK)
    positive("adapter", {"num_experts": adapter.num_experts})
    check_rules(ADAPTER_KINDS, adapter)
    if adapter.router_learning_rate is not None:
        positive("adapter", {"router_learning_rate": adapter.router_learning_rate})
        require(
            adapter.makes_experts or adapter.router == "after_warmup",
            "adapter.router_learning_rate is for routers that train: set "
            "adapter.router=after_warmup, or leave it out.",
        )


def _check_beside_experts(adapter, name: str) -> None:
    require(
        getattr(adapter, name) is None or adapter.kind in ("expert_lora", "mixlora"),
        f"adapter.{name} is for adapters that have experts beside plain LoRA, "
        f"adapter.kind=expert_lora or mixlora: with {adapter.kind} set "
        f"adapter.{name.removeprefix('expert_')}.",
    )


ADAPTER_TARGETS = (
    Rule(
        lambda a: bool(a.targets),
        lambda a: "adapter.targets must name at least one projection, got none.",
    ),
    Rule(
        lambda a: "gate_up" not in a.targets or not {"gate", "up"} & set(a.targets),
        lambda a: (
            "adapter.targets has gate_up next to gate or up: one or the other, got "
            f"{', '.join(a.targets)}."
        ),
    ),
)
ADAPTER_KINDS = (
    Rule(
        lambda a: (
            0 < a.experts_per_token <= a.num_experts
            or (a.experts_per_token > 0 and a.experts_per_layer is not None)
        ),
        lambda a: (
            "adapter.experts_per_token must be from 1 to adapter.num_experts "
            f"({a.num_experts}), got {a.experts_per_token}."
        ),
    ),
    Rule(
        lambda a: a.experts_per_layer is None or a.makes_experts,
        lambda a: (
            "adapter.experts_per_layer is for adapters with experts of their own, "
            f"adapter.kind=mola or mixlora, got {a.kind}."
        ),
    ),
    Rule(
        lambda a: a.top_p is None or 0 < a.top_p <= 1,
        lambda a: f"adapter.top_p must be in (0, 1] or None, got {a.top_p}.",
    ),
    Rule(
        lambda a: a.top_p is None or a.makes_experts,
        lambda a: (
            "adapter.top_p is how adapters with experts of their own choose among them, "
            f"adapter.kind=mixlora or mola, got {a.kind}; an MoE chooses as it was trained to."
        ),
    ),
    Rule(
        lambda a: a.kind == "expert_lora" or a.router == "frozen",
        lambda a: (
            f"adapter.router={a.router} is about the routers of an MoE: with "
            f"adapter.kind={a.kind} leave it at frozen (its own router always trains)."
        ),
    ),
    Rule(
        lambda a: not a.factor_dropout or a.kind == "lora",
        lambda a: (
            "adapter.factor_dropout leaves columns of A and rows of B out for all tokens at once; "
            f"with adapter.kind={a.kind} tokens have factors of different experts, most of them "
            "few tokens: use adapter.dropout, or set adapter.kind=lora."
        ),
    ),
    Rule(
        lambda a: not a.dora or a.kind == "lora",
        lambda a: (
            "adapter.dora=True rescales the columns of one adapted matrix; with "
            f"adapter.kind={a.kind} every token has other experts, and so another matrix. Set "
            "adapter.kind=lora."
        ),
    ),
)


# --------------------------------------------------------------------------------- across sections


def check_together(config) -> None:
    """Checks that every section is of its class, then what sections ask of each other."""
    for name, cls in field_types(type(config)).items():
        value = getattr(config, name)
        require(isinstance(value, cls), f"{name} must be a {cls.__name__}, got {value!r}.")
    check_rules(TOGETHER, config)


def _refusal(config) -> str | None:
    """Returns why the policy does not go with the placement."""
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
            f"allocation.kind={c.allocation.kind} shares ranks or experts out among layers "
            "alike, and adapter.experts_per_layer makes them different. Use one of them."
        ),
    ),
)
