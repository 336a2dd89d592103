"""Everything that is worth measuring on one accelerator, in one call.

    python benchmarks/gpu.py --out results.jsonl            # all parts, full sizes
    python benchmarks/gpu.py --rehearse --out rows.jsonl    # all parts, tiny, on this CPU

    bounds     a large matrix product and a large copy: the two ceilings of the device
    kernels    the grouped products of experts against float64, with all gradients; then a layer's
               experts of OLMoE with them and with every expert on every token
    step       a whole training step of the OLMoE-1B-7B shape, 4 rows of 4,096 tokens, random
               weights: tokens per second, 4 N + attention as shares of both ceilings, memory as
               forecast, compiled and measured
    qwen3      `step` of the Qwen3-30B-A3B shape, if the forecast fits the device
    peers      transformers + peft, and ours with the same shape, batch, targets, rank and optimizer
    event      new ranks in a running step: host time in ms and in steps; nothing compiles again
    grouped    grouped products of OLMoE's and Qwen3-30B-A3B's experts, forward and both gradients,
               by backend, uniform and skewed groups: rate, dense expansions, error against float32
    attention  forward and backward of every backend of the platform, long and packed rows, and
               whether a document sees another
    thin       grouped products with LoRA of 16, 32 and 64 ranks and their gradients
    steps      `step` with other rows and rematerialisation
    profile    kernels that the time of `step` goes to

Each line of the output is one measurement, with what failed as `error` and what was left out as
`skipped`. Times are medians after warm-up, with the result waited for; inputs are random. Parts
run in this order, in processes of their own with a deadline each and one for all: one that runs out
of memory or time (`error` is "time") does not end the others; what a call had no time for, another
measures with `--parts`. A row is in the file as soon as it is measured. Nine minutes fit a device
that is lent for fifteen. Needs no installation of the package, and no network.
Compiled programs are kept in build/xla_cache, or where JAX_COMPILATION_CACHE_DIR says.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout, installed or not

ROW = "ROW "  # begins a line of a child that is a result
# Of every part: its cases, each a process of its own, and seconds that each may take.
PARTS: dict[str, dict[str, int]] = {
    "bounds": {"": 45},
    "kernels": {"right": 90, "layer": 90},
    "step": {"4 selective": 120},
    "qwen3": {"2 selective": 150},
    "peers": {"peft": 90, "ours": 120},
    "event": {"": 90},
    "grouped": {"": 120},
    "attention": {"": 150},
    "thin": {"": 90},
    "steps": {
        f"{rows} {remat}": 120
        for rows, remat in (
            (2, "selective"),
            (2, "none"),
            (8, "selective"),
            (2, "full"),
            (4, "none"),
            (4, "full"),
            (8, "none"),
            (8, "full"),
        )
    },
    "profile": {"": 120},
}
CEILINGS = {"matmul_tflops": 1e12, "copy_gb_s": 1e9}  # names in rows of `bounds`, and units
TINY_CASES = 2  # of every part
PATIENCE = 5  # of a rehearsal: its machine does other things, too
LEAST_SECONDS = 5  # a process is not started for less
AGREEMENT = 1e-4  # of first losses with the same weights


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv=None) -> int:
    args = parse(argv)
    if args.child:
        return child(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children end as well
    end, failed, known = time.monotonic() + 60 * args.minutes, False, {}
    with tempfile.TemporaryDirectory() as folder:
        for part in (part for part in PARTS if part in args.parts):
            for row in part_rows(part, args.rehearse, folder, known, end):
                failed |= "error" in row
                line = json.dumps(row)
                print(line, flush=True)
                if args.out:
                    with open(args.out, "a", encoding="utf-8") as handle:
                        handle.write(line + "\n")
    return 1 if failed else 0


def parse(argv) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="file of JSON lines, also printed")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument(
        "--rehearse", action="store_true", help="on this CPU: small shapes, float32, few repeats"
    )
    parser.add_argument("--minutes", type=float, default=9, help="that all of it may take")
    for name in ("--child", "--case", "--folder", "--known"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if not args.minutes > 0:
        parser.error(f"--minutes must be greater than 0, got {args.minutes:g}")
    if args.out and not args.out.resolve().parent.is_dir():
        parser.error(f"there is no directory {args.out.resolve().parent} for --out")
    return args


# ---------------------------------------------------------------------------------------- processes


def part_rows(part: str, tiny: bool, folder: str, known: dict, end: float) -> Iterator[dict]:
    """Yields the rows of one part, with one process per case.

    Args:
      known: ceilings that `bounds` has found, which it fills in. end: when everything has to.
    """
    cases, patience = list(PARTS[part].items()), PATIENCE if tiny else 1
    rows = []
    for case, seconds in cases[:TINY_CASES] if tiny else cases:
        label = {"part": part} | ({"case": case} if case else {})
        command = [sys.executable, __file__, "--child", part, "--case", case, "--folder", folder]
        command += ["--known", json.dumps(known), *(["--rehearse"] if tiny else [])]
        for found in child_rows(command, min(patience * seconds, end - time.monotonic()), tiny):
            if part == "bounds":
                known |= {name: found[name] for name in CEILINGS if name in found}
            rows.append(label | found)
            yield rows[-1]
    if part == "peers":
        yield from peer_ratio(rows, shares_weights=tiny)


def child_rows(command: list[str], seconds: float, on_cpu: bool = False) -> Iterator[dict]:
    """Yields the rows that a process reports, and why it ended if it did not end by itself."""
    if seconds < LEAST_SECONDS:
        yield {"error": "time", "seconds": 0}
        return
    started, timed_out, last = time.monotonic(), threading.Event(), []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=child_environment() | ({"JAX_PLATFORMS": "cpu"} if on_cpu else {}),
        process_group=0,  # so that its own children end with it
    )

    def end_late():
        timed_out.set()
        kill(process)

    timer = threading.Timer(seconds, end_late)
    timer.start()
    with process:
        try:
            for line in process.stdout:
                if line.startswith(ROW):
                    yield json.loads(line.removeprefix(ROW))
                else:
                    last = [*last[-19:], line.rstrip()]
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                kill(process)
    if timed_out.is_set():
        yield {"error": "time", "seconds": round(time.monotonic() - started, 1)}
    elif code:
        yield {"error": f"exit code {code}", "output": last}


def kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def child_environment() -> dict[str, str]:
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / "build" / "xla_cache"),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return defaults | os.environ


def child(args: argparse.Namespace) -> int:
    """Runs one case of one part, and prints its rows."""
    import gpu_attention
    import gpu_grouped
    import gpu_kernels
    import gpu_peers
    import gpu_steps
    from gpu_setting import Setting, bounds, measured_ceilings

    parts = {
        "bounds": bounds,
        "kernels": gpu_kernels.kernels,
        "step": gpu_steps.step,
        "peers": gpu_peers.peers,
        "event": gpu_steps.event,
        "grouped": gpu_grouped.grouped,
        "attention": gpu_attention.attention,
        "thin": gpu_grouped.thin,
        "steps": gpu_steps.step,
        "qwen3": gpu_steps.qwen3,
        "profile": gpu_steps.profile,
    }
    if args.child == "peers":  # nothing of another framework, or of another case, in memory
        ceilings = (0.0, 0.0)
    else:
        known = json.loads(args.known or "{}")
        ceilings = [known[name] * unit for name, unit in CEILINGS.items() if name in known]
        ceilings = ceilings or measured_ceilings(args.rehearse)
    setting = Setting(args.rehearse, pathlib.Path(args.folder or "."), *ceilings)
    for row in parts[args.child](setting, args.case):
        print(ROW + json.dumps(row), flush=True)
    return 0


# -------------------------------------------------------------------------------------------- peers


def peer_ratio(rows: list[dict], *, shares_weights: bool) -> Iterator[dict]:
    """Returns our rate over peft's; with the same weights the first losses have to agree."""
    sides = {row["case"]: row for row in rows if "error" not in row}
    if sides.keys() != {"peft", "ours"}:
        return
    ours, peft = sides["ours"], sides["peft"]
    names = ("tokens_per_second", "peak_gib")
    row = {"part": "peers", "case": "ratio", "of": "ours / peft"}
    row |= {name: ours[name] / peft[name] for name in names}
    row["first_losses"] = [ours["first_loss"], peft["first_loss"]]
    apart = abs(ours["first_loss"] - peft["first_loss"]) / peft["first_loss"]
    if shares_weights and not apart <= AGREEMENT:
        row["error"] = f"first losses are {apart:.1e} apart with the same weights"
    yield row


if __name__ == "__main__":
    sys.exit(main())
