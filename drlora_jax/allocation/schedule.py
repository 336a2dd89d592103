"""When the events of a policy may happen."""

from drlora_jax.errors import UserError


def event_window(
    *, total_steps: int, warmup_ratio: float, interval: int, last_event: int | None
) -> tuple[int, int]:
    """Optimizer steps done at the end of warm-up, and at the last possible event: `interval` before
    the end of the run unless it is given.
    """
    first = max(1, int(warmup_ratio * total_steps))
    last = total_steps - interval if last_event is None else last_event
    if last > total_steps:
        raise UserError(
            f"allocation.last_event ({last}) must not lie behind the last step of the run "
            f"({total_steps})."
        )
    return first, last


def last_event_words(last: int, total_steps: int, interval: int) -> str:
    """Where the last event may be, for the message that none fits."""
    if last > 0:
        return f"the last event may be at step {last} of {total_steps}"
    return (
        f"the last event comes {interval} steps before the end, which would be before step 1 of "
        f"{total_steps}"
    )
