"""Where a run lies, and what it keeps and reports."""

from dataclasses import dataclass

from drlora_jax.config.sections.section import Section, positive, require


@dataclass(frozen=True)
class RunSection(Section):
    dir: str = "runs/default"
    seed: int = 0
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps; evaluations, the last step and SIGTERM save as well
    keep_last: int = 2  # newest checkpoints kept, besides the best by eval loss
    tensorboard: bool = False  # also write the logs for TensorBoard, in run.dir/tensorboard
    # With several processes: seconds without a sign of life after which one is given up, and
    # seconds in which nothing moves (a step, a file read, a compilation) after which all end.
    heartbeat_timeout: int = 60
    stall_timeout: int = 1800

    def check(self):
        require(bool(self.dir), "run.dir must name a directory, got an empty string.")
        in_range = 0 <= self.seed < 2**32
        require(in_range, f"run.seed must be 0 or more and below 2**32, got {self.seed}.")
        counts = {"log_every": self.log_every, "checkpoint_every": self.checkpoint_every}
        positive("run", counts | {"keep_last": self.keep_last})
        limits = {"heartbeat_timeout": self.heartbeat_timeout, "stall_timeout": self.stall_timeout}
        positive("run", limits)
