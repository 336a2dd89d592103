"""Shows the progress of a run, and measures its throughput and memory.

On a terminal a progress bar, the newest figures and the rank map stay at the bottom while events
and evaluations scroll by above them. Elsewhere each is printed as a plain line.
"""

import pathlib
import sys
import time

import jax
import numpy as np
import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from drlora_jax.reporting.palette import shade
from drlora_jax.reporting.terminal import MAX_ROWS, heat_map

# bf16 matrix peak of one device in FLOP/s, by the start of its kind; unknown devices log no MFU.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
BAR = shade(0.6)


def peak_flops(devices: int) -> float | None:
    """Returns the peak of that many devices together; None if it is not known."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if kind.startswith(name):
            return peak * devices
    return None


def peak_memory() -> dict[str, int]:
    """Returns peak bytes since the start: of this process, and of its fullest device if that is
    known.
    """
    memory = {}
    host = _host_peak()
    if host is not None:
        memory["host_peak_bytes"] = host
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        memory["device_peak_bytes"] = max(peaks)
    return memory


def _host_peak() -> int | None:
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: after a fork that counts the parent's memory, too.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Throughput:
    """Measures tokens per second over training steps, excluding the time between steps (growth
    events, evaluations, checkpoints).

    The clock runs from `resume` to `pause`. Call `take` after the last added step has ended and
    before the next one starts.

    Args:
      clock: returns the time in seconds.
    """

    def __init__(self, flops_per_token: float, devices: int, clock=time.perf_counter):
        self._flops_per_token = flops_per_token
        self._devices = devices
        self._clock = clock
        self._tokens, self._seconds = 0, 0.0
        self._since: float | None = None  # None: paused

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += self._clock() - self._since
        self._since = None

    def resume(self) -> None:
        if self._since is None:
            self._since = self._clock()

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def take(self) -> dict:
        """Returns the rates over the steps since the last call."""
        if self._since is not None:
            now = self._clock()
            self._seconds, self._since = self._seconds + now - self._since, now
        rate = self._tokens / self._seconds if self._seconds else 0.0
        self._tokens, self._seconds = 0, 0.0
        peak = peak_flops(self._devices)
        mfu = None if peak is None else rate * self._flops_per_token / peak
        return {"tokens_per_second": round(rate, 1), "mfu": mfu}


class Progress:
    """Shows steps; `note` prints a line that stays. Leaving its context restores the terminal,
    however the run ended.
    """

    def __init__(self, total: int, done: int, console: Console | None = None):
        # Explicit, because FORCE_COLOR would make rich draw into a file or a pipe.
        self._console = console or Console(force_terminal=sys.stdout.isatty(), highlight=False)
        self._total = total
        self._map: tuple | None = None
        self._newest: dict = {}
        self._live = None
        if self._console.is_interactive:
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(40, complete_style=BAR, finished_style=BAR),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("left"),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total, completed=done)
            self._row = Text(no_wrap=True)
            self._live = Live(self._view(), console=self._console, refresh_per_second=2)
            self._live.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def advance(self) -> None:
        if self._live is not None:
            self._bar.advance(self._task)

    def show(self, row: dict) -> None:
        """Shows a row of metrics.jsonl."""
        figures = "  ".join(_figures(row))
        if self._live is not None:
            self._newest |= row  # a figure stays until it is measured again
            self._row = Text("  ".join(_figures(self._newest)), no_wrap=True)
            self._live.update(self._view())
        if self._live is None or "eval_loss" in row:
            self.note(f"step {row['step']}/{self._total}  {figures}")

    def show_ranks(self, ranks_LE: np.ndarray, max_rank: int, layers: tuple[int, ...]) -> None:
        """Shows the rank map at the bottom; does nothing unless the output is a terminal."""
        if self._live is not None and ranks_LE.size:
            self._map = (ranks_LE.copy(), max_rank, layers)
            self._live.update(self._view())

    def note(self, text: str) -> None:
        if self._live is None:
            print(text, flush=True)
        else:
            self._console.print(Text(text))

    def close(self) -> None:
        if self._live is not None:
            self._live.update(self._view(), refresh=True)
            self._live.stop()
            self._live = None

    def _view(self) -> Group:
        console, parts = self._console, []
        if self._map is not None:
            rows = max(min(MAX_ROWS, console.height - 5), 2)
            has_colour = console.color_system is not None and not console.no_color
            shape = {"width": console.width, "max_rows": rows, "has_colour": has_colour}
            parts = [Text(), heat_map(*self._map, **shape), Text()]
        return Group(*parts, self._bar, self._row)


def _figures(row: dict) -> list[str]:
    parts = [f"loss {row['loss']:.4f}"] if "loss" in row else []
    parts += [f"eval {row['eval_loss']:.4f}"] if "eval_loss" in row else []
    parts += [f"{row['tokens_per_second']:,.0f} tok/s"] if "tokens_per_second" in row else []
    parts += [f"mfu {row['mfu']:.1%}"] if row.get("mfu") else []
    return parts


def describe_ranks(step: int, before_LE: np.ndarray, ranks_LE: np.ndarray) -> str:
    if (before_LE == ranks_LE).all():
        return f"step {step}: ranks unchanged, the budget is spent"
    low, high = ranks_LE.min(), ranks_LE.max()
    means = f"{before_LE.mean():.2f} -> {ranks_LE.mean():.2f}"
    return f"step {step}: mean rank {means} (min {low}, max {high})"
