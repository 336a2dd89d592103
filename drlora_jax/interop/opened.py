"""Opens an export with the libraries that will use it, if they are installed.

`open_export.py` does so in a separate process; this module decides whether that is possible, and
compares the results with the run: the logits of a few short prompts, the tie of the output head,
the end tokens and the tokenizer's ids. If it is not possible, a line says so.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy as np

from drlora_jax.errors import RunError
from drlora_jax.interop import open_export
from drlora_jax.interop.export_check import MAX_KL
from drlora_jax.interop.exported_files import adapter_shapes
from drlora_jax.interop.hf_files import HEAD, read_headers
from drlora_jax.interop.verify import TEXTS, token_kl
from drlora_jax.system.text import counted

MERGED = open_export.MERGED
PROMPTS, PROMPT_LENGTH = 3, 16
MIN_PEFT = (0, 20)  # older ones raise TypeError with transformers 5.24
# Relative to f32 weights: the parts of experts are joined while they are read.
MEMORY_FACTOR, MEMORY_START = 1.3, 1 << 30


class Export(NamedTuple):
    """A written and verified export, and the values to compare it with."""

    layout: str  # merged, peft or peft-2d
    base: pathlib.Path
    directory: pathlib.Path
    prompts: list[np.ndarray]
    logits: list[np.ndarray]  # of the prompts, as computed here from the exported files
    ids: list[list[int]]  # of verify.TEXTS, as the tokenizer of the run gives them
    ends: tuple[int, ...] = ()


def check_opened(export: Export) -> list[str]:
    """Opens the export with the libraries and returns the lines to print; raises RunError if they
    do not read what was exported.
    """
    reason = why_not(export)
    if reason is None:
        answer, logits = _ask(export)
        reason = answer.get("unavailable")
    if reason is not None:
        return [f"files    names, shapes, dtypes and settings are right; not opened: {reason}"]
    return judge_answer(export, answer, logits)


def why_not(export: Export) -> str | None:
    """Returns the reason why the export cannot be opened here; None if it can."""
    peft = [] if export.layout == MERGED else ["peft"]
    for name in ("torch", "transformers", *peft):
        if importlib.util.find_spec(name) is None:
            readers = " and ".join(["transformers", *peft])
            return f"{name} is not installed, so {readers} did not load the model"
    version = _version("peft") if peft else None
    if version and _numbers(version) < MIN_PEFT:
        wanted = ".".join(map(str, MIN_PEFT))
        return f"peft {version} is too old for transformers 5; use {wanted} or newer"
    needed, free = _memory_needed(export), available_memory()
    if free is not None and needed > free:
        return (
            f"the model needs {needed / 2**30:.1f} GiB in float32, but {free / 2**30:.1f} GiB of "
            "memory are free"
        )
    return None


def judge_answer(export: Export, answer: dict, logits: list[np.ndarray]) -> list[str]:
    """Returns the lines to print for an answer of open_export.py; raises RunError if the answer is
    not the expected one.
    """
    with_what = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    if "failed" in answer:
        raise RunError(f"the export cannot be opened with {with_what}: {answer['failed']}")
    notes = _judge_merged(export, answer) if export.layout == MERGED else []
    ours = [array[:PROMPT_LENGTH] for array in export.logits[:PROMPTS]]
    kls = [float(token_kl(a, b).max()) for a, b in zip(ours, logits, strict=True)]
    # The median: in one prompt a tie in the choice of experts may be broken differently.
    kl = sorted(kls)[len(kls) // 2]
    if not kl <= MAX_KL:
        raise RunError(
            f"opened with {with_what}, the export computes something different: KL {kl:.3g} nats "
            f"per token, at most {MAX_KL:g} is allowed."
        )
    return [
        f"opened   with {with_what}: {counted(len(kls), 'prompt')}, KL {kl:.1e} per token",
        *notes,
    ]


def _judge_merged(export: Export, answer: dict) -> list[str]:
    if answer["wrong_keys"]:
        kind, keys = next(iter(answer["wrong_keys"].items()))
        raise RunError(
            f"transformers finds {len(keys)} {kind.replace('_', ' ')} in the export, the first is "
            f"{keys[0]}."
        )
    has_head = HEAD in read_headers(export.directory)
    if answer["is_tied"] == has_head:
        tied = "ties" if has_head else "does not tie"
        raise RunError(f"transformers {tied} the output head to the embedding, unlike the weights.")
    ends = answer["ends"] if isinstance(answer["ends"], list) else [answer["ends"]]
    if not set(export.ends) <= set(ends):
        raise RunError(f"transformers stops at {ends}, but the run's texts end at {export.ends}.")
    return _judge_tokenizer(export, answer)


def _judge_tokenizer(export: Export, answer: dict) -> list[str]:
    theirs = answer["tokenizer"]
    if theirs == export.ids:
        return []
    if theirs != answer["base_tokenizer"]:
        raise RunError(
            "transformers reads a different tokenizer from the export than from the base model: "
            f"{_first_difference(answer['base_tokenizer'], theirs)}"
        )
    return [
        "note     transformers' AutoTokenizer does not give the token ids of the run, neither for "
        f"the base model nor for the export: {_first_difference(export.ids, theirs)}. Load "
        "tokenizer.json with PreTrainedTokenizerFast(tokenizer_file=...)."
    ]


def _first_difference(wanted, found) -> str:
    if isinstance(wanted, str) or isinstance(found, str):
        return f"{found if isinstance(found, str) else wanted}"
    text, a, b = next(part for part in zip(TEXTS, wanted, found, strict=True) if part[1] != part[2])
    return f"{text[:20]!r} becomes {b[:6]}, not {a[:6]}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a folder on the path, not installed
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


# --------------------------------------------------------------------------- memory and the process


def _memory_needed(export: Export) -> int:
    is_merged = export.layout == MERGED
    base = read_headers(export.directory if is_merged else export.base)
    shapes = [info.shape for info in base.values()]
    shapes += [] if is_merged else adapter_shapes(export.directory).values()
    values = sum(map(math.prod, shapes))
    return int(4 * values * MEMORY_FACTOR) + MEMORY_START


def available_memory() -> int | None:
    """Returns the bytes that a new process may allocate, as Linux says; None elsewhere."""
    found = []
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        found.append(int(values["MemAvailable"].split()[0]) << 10)
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = pathlib.Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no such group, or its limit is "max"
        pass
    return min(found, default=None)


def make_request(export: Export) -> dict:
    """Returns the request for open_export.py."""
    return {
        "layout": export.layout,
        "base": str(export.base.resolve()),
        "export": str(export.directory.resolve()),
        "prompts": [ids[:PROMPT_LENGTH].tolist() for ids in export.prompts[:PROMPTS]],
        "texts": list(TEXTS),
        "ids": export.ids,
    }


def _ask(export: Export) -> tuple[dict, list[np.ndarray]]:
    """Runs open_export.py; returns its answer and its logits by prompt."""
    with tempfile.TemporaryDirectory(prefix="drlora-export-") as name:
        folder = pathlib.Path(name)
        files = [folder / file for file in ("request.json", "answer.json", "logits.npz")]
        files[0].write_text(json.dumps(make_request(export)), encoding="utf-8")
        # -P, because the folder of the script has modules with common names.
        command = [sys.executable, "-P", open_export.__file__, *map(str, files)]
        quiet = {
            "CUDA_VISIBLE_DEVICES": "",  # jax uses the accelerator
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        ended = subprocess.run(
            command, env=os.environ | quiet, capture_output=True, text=True, errors="replace"
        )
        if not files[1].is_file():
            return {"unavailable": _end_in_words(ended)}, []
        answer = json.loads(files[1].read_text(encoding="utf-8"))
        if not files[2].is_file():
            return answer, []
        with np.load(files[2]) as arrays:
            return answer, [arrays[name] for name in arrays.files]


def _end_in_words(ended: subprocess.CompletedProcess) -> str:
    if ended.returncode < 0:
        return f"the process was ended by signal {-ended.returncode} (out of memory?)"
    lines = ended.stderr.strip().splitlines() or ["no message"]
    return f"the process ended with exit code {ended.returncode}: {lines[-1]}"
