"""Determines when the events of a policy may happen."""

from dataclasses import dataclass

from drlora_jax.allocation.base import Context, PolicyFields
from drlora_jax.errors import UserError
from drlora_jax.system.fields import fraction, option, positive, require


@dataclass(frozen=True)
class EventFields(PolicyFields):
    """Fields of policies that have events."""

    interval: int = option(200, "optimizer steps between events")
    warmup_ratio: float | None = option(
        None, "fraction of all steps before the first event; none: train.warmup_ratio"
    )
    last_event: int | None = option(
        None, "step after which no rank changes; none: the last step minus interval"
    )

    def check_events(self) -> None:
        positive("allocation", {"interval": self.interval})
        if self.warmup_ratio is not None:
            fraction("allocation", {"warmup_ratio": self.warmup_ratio})
        require(
            self.last_event is None or self.last_event > 0,
            f"allocation.last_event must be greater than 0, got {self.last_event}.",
        )

    def event_window(self, context: Context) -> tuple[int, int]:
        """Returns the number of optimizer steps at the end of warm-up, and at the last possible
        event: `interval` before the end of the run unless `last_event` is set.
        """
        total, ratio = context.total_steps, self.warmup_ratio
        first = max(1, int((context.warmup_ratio if ratio is None else ratio) * total))
        last = total - self.interval if self.last_event is None else self.last_event
        if last > total:
            raise UserError(
                f"allocation.last_event ({last}) must not be after the last step of the run "
                f"({total})."
            )
        return first, last


def last_event_words(last: int, total_steps: int, interval: int) -> str:
    """Describes where the last event may be, for the message that no event fits."""
    if last > 0:
        return f"the last event may be at step {last} of {total_steps}"
    return (
        f"the last event is {interval} steps before the end, which would be before step 1 of "
        f"{total_steps}"
    )
