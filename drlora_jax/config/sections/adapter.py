"""What is trained: kind and place of the factors, their experts and routers."""

from dataclasses import dataclass
from typing import Literal

from drlora_jax.config.sections.section import (
    LARGEST_RANK,
    Section,
    at_most,
    fraction,
    positive,
    require,
)


@dataclass(frozen=True)
class AdapterSection(Section):
    # expert_lora: on the experts of an MoE; lora: one pair a matrix; mixlora: experts of its own on
    # the FFNs of a dense model, with a router; mola: on every matrix, each with its router
    kind: Literal["expert_lora", "lora", "mixlora", "mola"] = "expert_lora"
    targets: tuple[str, ...] = ("up", "down")  # roles, or regular expressions over parameter paths
    scale: float = 2.0  # alpha / rank: constant, whatever rank is active
    dropout: float = 0.1  # on the input of every low-rank product, in training
    # of the factors of experts, where plain LoRA beside them has another; None: the same
    expert_scale: float | None = None
    expert_dropout: float | None = None
    # of kind lora: share of A's columns and of B's rows left out of a training step (LoRA Dropout)
    factor_dropout: float = 0.0
    rank: int | None = None  # of plain LoRA (attention, dense FFN); None: allocation.r_target
    router: Literal["frozen", "after_warmup"] = "frozen"
    router_learning_rate: float | None = None  # None: train.learning_rate
    num_experts: int = 8  # of mixlora and mola
    # of every layer, instead of num_experts: 2468 (MoLA: by quarters of the depth), 2,4,4 (by
    # layer), or FILE.json of drlora_jax.alpha (AlphaLoRA)
    experts_per_layer: str | None = None
    experts_per_token: int = 2  # of mixlora and mola; a layer with fewer uses all it has
    # of both, instead of experts_per_token: the best experts up to this sum of probabilities
    top_p: float | None = None
    dora: bool = False  # of kind lora: lengths of the columns of W' train apart (DoRA)
    freeze_a: bool = False  # only B trains (FFA-LoRA)
    freeze_idle_experts: bool = True  # no tokens in a step: factors and moments stay as they are

    @property
    def makes_experts(self) -> bool:
        """Whether the adapter has experts of its own, on a dense model."""
        return self.kind in ("mixlora", "mola")

    def check(self):
        require(bool(self.targets), "adapter.targets must name at least one projection, got none.")
        fused = "gate_up" in self.targets and {"gate", "up"} & set(self.targets)
        require(
            not fused,
            f"adapter.targets has gate_up next to gate or up: one or the other, got "
            f"{', '.join(self.targets)}.",
        )
        require(self.scale > 0, f"adapter.scale must be greater than 0, got {self.scale}.")
        fraction("adapter", {"dropout": self.dropout, "factor_dropout": self.factor_dropout})
        for name in ("expert_scale", "expert_dropout"):
            require(
                getattr(self, name) is None or self.kind in ("expert_lora", "mixlora"),
                f"adapter.{name} is for adapters that have experts beside plain LoRA, "
                f"adapter.kind=expert_lora or mixlora: with {self.kind} set "
                f"adapter.{name.removeprefix('expert_')}.",
            )
        if self.expert_scale is not None:
            positive("adapter", {"expert_scale": self.expert_scale})
        fraction("adapter", {"expert_dropout": self.expert_dropout or 0.0})
        require(
            self.rank is None or self.rank > 0,
            f"adapter.rank must be greater than 0, got {self.rank}.",
        )
        at_most("adapter.rank", self.rank or 0, LARGEST_RANK)
        positive("adapter", {"num_experts": self.num_experts})
        require(
            0 < self.experts_per_token <= self.num_experts
            or (self.experts_per_token > 0 and self.experts_per_layer is not None),
            "adapter.experts_per_token must be from 1 to adapter.num_experts "
            f"({self.num_experts}), got {self.experts_per_token}.",
        )
        require(
            self.experts_per_layer is None or self.makes_experts,
            "adapter.experts_per_layer is for adapters with experts of their own, "
            f"adapter.kind=mola or mixlora, got {self.kind}.",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"adapter.top_p must be in (0, 1] or None, got {self.top_p}.",
        )
        require(
            self.top_p is None or self.makes_experts,
            "adapter.top_p is how adapters with experts of their own choose among them, "
            f"adapter.kind=mixlora or mola, got {self.kind}; an MoE chooses as it was trained to.",
        )
        require(
            self.kind == "expert_lora" or self.router == "frozen",
            f"adapter.router={self.router} is about the routers of an MoE: with "
            f"adapter.kind={self.kind} leave it at frozen (its own router always trains).",
        )
        require(
            not self.factor_dropout or self.kind == "lora",
            "adapter.factor_dropout leaves columns of A and rows of B out for all tokens at once; "
            f"with adapter.kind={self.kind} tokens have factors of different experts, most of them "
            "few tokens: use adapter.dropout, or set adapter.kind=lora.",
        )
        require(
            not self.dora or self.kind == "lora",
            "adapter.dora=True rescales the columns of one adapted matrix; with "
            f"adapter.kind={self.kind} every token has other experts, and so another matrix. Set "
            "adapter.kind=lora.",
        )
        if self.router_learning_rate is not None:
            positive("adapter", {"router_learning_rate": self.router_learning_rate})
            require(
                self.makes_experts or self.router == "after_warmup",
                "adapter.router_learning_rate is for routers that train: set "
                "adapter.router=after_warmup, or leave it out.",
            )
