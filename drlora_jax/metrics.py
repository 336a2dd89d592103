"""What a run shows while it goes: a progress bar on a terminal, plain lines otherwise; and the rate
it runs at.
"""

import sys
import time

import jax
import numpy as np
from tqdm import tqdm

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


def peak_flops(devices: int) -> float | None:
    """Of that many devices together; None where the peak is not known."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if kind.startswith(name):
            return peak * devices
    return None


class Throughput:
    """Tokens a second of training, without the time of evaluation and checkpoints."""

    def __init__(self, flops_per_token: float, devices: int):
        self._flops_per_token = flops_per_token
        self._devices = devices
        self._tokens, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def pause(self) -> None:
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def take(self) -> dict:
        """The rates since the last call."""
        self.pause()
        rate = self._tokens / self._seconds if self._seconds else 0.0
        self._tokens, self._seconds = 0, 0.0
        self.resume()
        peak = peak_flops(self._devices)
        mfu = None if peak is None else rate * self._flops_per_token / peak
        return {"tokens_per_second": round(rate, 1), "mfu": mfu}


class Progress:
    """Shows steps; `note` prints a line that stays."""

    def __init__(self, total: int, done: int):
        is_terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)
            if is_terminal
            else None
        )
        self._total = total

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def show(self, row: dict) -> None:
        parts = [f"loss {row['loss']:.4f}"] if "loss" in row else []
        parts += [f"eval {row['eval_loss']:.4f}"] if "eval_loss" in row else []
        parts += [f"{row['tokens_per_second']:,.0f} tok/s"] if "tokens_per_second" in row else []
        parts += [f"mfu {row['mfu']:.1%}"] if row.get("mfu") else []
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts))
        if self._bar is None or "eval_loss" in row:
            self.note(f"step {row['step']}/{self._total}  {'  '.join(parts)}")

    def note(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def describe_ranks(step: int, before_LE: np.ndarray, ranks_LE: np.ndarray) -> str:
    if (before_LE == ranks_LE).all():
        return f"step {step}: ranks stay as they are, the budget is spent"
    low, high = ranks_LE.min(), ranks_LE.max()
    return f"step {step}: ranks grow to a mean of {ranks_LE.mean():.2f}, from {low} to {high}"
