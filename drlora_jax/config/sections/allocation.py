"""How ranks are shared out among experts, and when."""

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
class AllocationSection(Section):
    # random: the schedule of dr_lora, experts drawn by lot
    kind: Literal[
        "uniform",
        "dr_lora",
        "random",
        "adalora",
        "moe_sieve",
        "prilora",
        "alphalora",
        "pattern",
    ] = "dr_lora"
    # active ranks at the start; from 0 an expert has no importance and grows late. prilora: of the
    # first layer
    r_init: int = 8
    r_target: int = 16  # mean active rank at the end (uniform: always); a layer has E * r_target
    # of uniform: r_target divided by the experts a token has, or by those a layer has
    rank_rule: Literal["fixed", "per_top_k", "per_expert"] = "fixed"
    r_max: int = 32  # allocated ranks of every expert (uniform: r_target)
    interval: int = 200  # optimizer steps between events
    p_grow: float = 0.1  # an expert gains at most ceil(p_grow * (r_max - r_init)) ranks an event
    gamma: float = 1.2  # saliency = f * g / (rank + 1) ** gamma
    frequency_decay: float = 0.9  # of the routing-frequency EMA, an optimizer step
    importance_decay: float = 0.9  # of the rank-importance EMA (adalora: its beta1)
    uncertainty_decay: float = 0.85  # adalora: of the EMA of how much the importance varies, beta2
    frequency: Literal["weight", "count"] = "weight"
    # probe: not of the active ranks, but of the next one (see allocation/dr_lora.py)
    importance: Literal["gate_abs", "gate_sq", "elementwise_product", "probe"] = "gate_abs"
    saliency: Literal["product", "frequency", "importance"] = "product"
    warmup_ratio: float | None = (
        None  # of all steps, before the first event; None: train.warmup_ratio
    )
    last_event: int | None = None  # nothing changes after this step; None: total steps - interval
    released: bool = False  # what the authors' released code does, where it differs from the paper
    share: float = 0.25  # of a layer's experts that moe_sieve adapts
    profile_rows: int = 64  # of training data that moe_sieve reads first to count who is used
    pattern: str | None = None  # file of kind pattern: ranks [layers][experts], or a ranks.jsonl
    experts: int | None = None  # of alphalora with mixlora or mola: of all layers
    alpha_beta: float = 2.5  # alphalora, spectral_start: shares are alpha ** alpha_beta
    # dr_lora: saliency * (alpha of the expert / mean of its layer) ** spectral_prior; 0: off
    spectral_prior: float = 0.0
    # dr_lora: the first ranks of a layer's experts by alpha ** alpha_beta, r_init on average
    spectral_start: bool = False
    # of alphalora and these two: written by `drlora_jax.alpha --out`; None: computed
    alpha_file: str | None = None
    alpha_estimator: Literal["fix_finger", "median"] = "fix_finger"

    @property
    def asks_for_exponents(self) -> bool:
        """Whether ranks come from the heavy-tail exponents of the base's weights."""
        return self.kind == "alphalora" or self.spectral_prior != 0 or self.spectral_start

    def check(self):
        at_most("allocation.r_target", self.r_target, LARGEST_RANK)
        at_most("allocation.r_max", self.r_max, LARGEST_RANK)
        require(
            self.spectral_prior == 0 or (self.kind == "dr_lora" and not self.released),
            "allocation.spectral_prior is a factor of the saliency of kind=dr_lora "
            f"(released=False), got kind={self.kind} and released={self.released}.",
        )
        require(
            not self.spectral_start or (self.kind == "dr_lora" and not self.released),
            "allocation.spectral_start gives kind=dr_lora (released=False) its first ranks, got "
            f"kind={self.kind} and released={self.released}.",
        )
        require(
            not self.spectral_start or self.r_init > 0,
            "allocation.spectral_start shares out r_init ranks an expert; set r_init to 1 or more.",
        )
        for name, kinds in (("experts", "alphalora"), ("pattern", "pattern")):
            value = getattr(self, name)
            require(
                value is None or self.kind == kinds,
                f"allocation.{name}={value} is for kind={kinds}, got kind={self.kind}; leave it "
                "out.",
            )
        require(
            self.alpha_file is None or self.asks_for_exponents,
            f"allocation.alpha_file={self.alpha_file} is for kind=alphalora, spectral_prior and "
            f"spectral_start, got kind={self.kind} without them; leave it out.",
        )
        require(
            self.rank_rule == "fixed" or self.kind == "uniform",
            f"allocation.rank_rule={self.rank_rule} is a form of kind=uniform, got "
            f"kind={self.kind}.",
        )
        if self.experts is not None:
            positive("allocation", {"experts": self.experts})
        if self.kind in ("dr_lora", "random"):
            self._check_growth()
        elif self.kind == "adalora":
            self._check_pruning()
        else:
            self._check_static()

    def _check_static(self):
        # Nothing grows: r_target is the mean rank, r_max what is allocated (uniform: r_target).
        positive("allocation", {"r_target": self.r_target, "r_max": self.r_max})
        if self.kind == "moe_sieve":
            require(0 < self.share <= 1, f"allocation.share must be in (0, 1], got {self.share}.")
            positive("allocation", {"profile_rows": self.profile_rows})
        if self.kind == "pattern":
            require(
                bool(self.pattern),
                "allocation.kind=pattern needs allocation.pattern=FILE: ranks [layers][experts] "
                "as JSON, or the ranks.jsonl of a run.",
            )

    def _check_growth(self):
        require(
            0 <= self.r_init <= self.r_target <= self.r_max and self.r_max > 0,
            "allocation needs 0 <= r_init <= r_target <= r_max, "
            f"got {self.r_init}, {self.r_target}, {self.r_max}.",
        )
        self._check_events()
        positive("allocation", {"p_grow": self.p_grow})
        require(self.gamma >= 0, f"allocation.gamma must be 0 or more, got {self.gamma}.")
        fraction("allocation", {"frequency_decay": self.frequency_decay})
        require(
            not self.released or (self.importance == "gate_abs" and self.saliency == "product"),
            "allocation.released=True fixes importance=gate_abs and saliency=product, "
            f"got {self.importance} and {self.saliency}.",
        )
        require(
            self.kind == "dr_lora" or not self.released,
            f"allocation.released=True is a form of kind=dr_lora, got kind={self.kind}.",
        )

    def _check_pruning(self):
        require(
            0 < self.r_target <= self.r_init <= self.r_max,
            "allocation.kind=adalora prunes from r_init to r_target: it needs 0 < r_target <= "
            f"r_init <= r_max, got r_target={self.r_target}, r_init={self.r_init}, "
            f"r_max={self.r_max}.",
        )
        self._check_events()
        fraction("allocation", {"uncertainty_decay": self.uncertainty_decay})
        require(
            self.importance != "probe",
            "allocation.importance=probe measures the next rank, and adalora prunes the present "
            "ones: set gate_abs, gate_sq or elementwise_product.",
        )

    def _check_events(self):
        positive("allocation", {"interval": self.interval})
        fraction("allocation", {"importance_decay": self.importance_decay})
        if self.warmup_ratio is not None:
            fraction("allocation", {"warmup_ratio": self.warmup_ratio})
        require(
            self.last_event is None or self.last_event > 0,
            f"allocation.last_event must be greater than 0, got {self.last_event}.",
        )
