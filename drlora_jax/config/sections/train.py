"""The optimizer, its schedule and the batch."""

from dataclasses import dataclass
from typing import Literal

from drlora_jax.config.sections.section import Section, at_most, fraction, positive, require

LARGEST_BATCH = 2**31 - 1  # tokens: positions are 32-bit on devices


@dataclass(frozen=True)
class TrainSection(Section):
    steps: int | None = None  # optimizer steps; exactly one of steps and epochs
    epochs: int | None = None
    batch_size: int = 8  # rows an optimizer step, over all devices and micro-batches
    micro_batches: int = 1  # the batch is computed in this many parts
    sequence_length: int = 512  # tokens a row
    learning_rate: float = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.03  # of all steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    b_learning_rate_ratio: float = 1.0  # of B's learning rate to A's (LoRA+: 16)
    # Adam's step count: of the run, or of every rank since it first had a gradient
    bias_correction: Literal["global", "per_rank"] = "global"
    max_grad_norm: float | None = 1.0
    balance_loss: float = 0.0  # weight of the load-balance loss; 0: off
    # pooled: of all layers with experts at once; per_layer: of each, averaged; switch: the same,
    # of first choices only
    balance_form: Literal["pooled", "per_layer", "switch"] = "pooled"
    z_loss: float = 0.0  # weight of the mean squared logsumexp of the router logits; 0: off
    eval_every: int = 100  # steps
    eval_batches: int | None = None  # None: the whole held-out set

    def check(self):
        require(
            (self.steps is None) != (self.epochs is None),
            f"Set exactly one of train.steps and train.epochs, got {self.steps} and {self.epochs}.",
        )
        counts = (
            "steps",
            "epochs",
            "batch_size",
            "micro_batches",
            "sequence_length",
            "eval_every",
            "eval_batches",
        )
        given = {name: getattr(self, name) for name in counts}
        positive("train", {name: value for name, value in given.items() if value is not None})
        positive("train", {"learning_rate": self.learning_rate, "epsilon": self.epsilon})
        positive("train", {"b_learning_rate_ratio": self.b_learning_rate_ratio})
        fraction(
            "train", {"warmup_ratio": self.warmup_ratio, "beta1": self.beta1, "beta2": self.beta2}
        )
        for name in ("weight_decay", "balance_loss", "z_loss"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name} must be 0 or more, got {value}.")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"train.max_grad_norm must be greater than 0 or None, got {self.max_grad_norm}.",
        )
        require(
            self.batch_size % self.micro_batches == 0,
            f"train.batch_size ({self.batch_size}) must be a multiple of train.micro_batches "
            f"({self.micro_batches}).",
        )
        tokens = self.batch_size * self.sequence_length
        name = "train.batch_size * train.sequence_length"
        at_most(name, tokens, LARGEST_BATCH, " tokens")
