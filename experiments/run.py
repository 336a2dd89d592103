"""Runs the missing cells of a study and writes its results as data.

    python -m experiments.run --study experiments/growth.py --out build/growth --jobs 2

Every cell is a separate training (`python -m drlora_jax.train`) in OUT/cells/TASK/ARM/..., on one
core. Stop it with Ctrl-C or SIGTERM: the trainings save, and the same command resumes. After every
cell experiments/results/<study>.json has all finished cells.

    --again TASK/ARM/SEED    repeats that cell elsewhere and compares the losses
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time

from experiments.results import collect, finished_losses, read_cell, write_results
from experiments.study import (
    Cell,
    Study,
    count_cells,
    load_study,
    overrides_of,
    ready_cells,
    tuned_rate,
)

ROOT = pathlib.Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the runs go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    parser.add_argument("--arms", help="only these, by name with commas; default: all")
    parser.add_argument("--again", metavar="TASK/ARM/SEED", help="repeat one cell and compare")
    args = parser.parse_args()
    study, out = load_study(args.study), args.out.resolve()
    if args.again:
        return again(study, args.study, out, args.again)
    arms = args.arms.split(",") if args.arms else [arm.name for arm in study.arms]
    is_complete = run_all(study, args.study, out, args.jobs, arms)
    return 0 if is_complete else 75


def run_all(study: Study, file: pathlib.Path, out: pathlib.Path, jobs: int, arms) -> bool:
    """Keeps `jobs` trainings going until nothing of `arms` is left; False if cells are missing."""
    running: dict[Cell, tuple[subprocess.Popen, int]] = {}
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    while True:
        done = finished_losses(study, out)
        if not stopped:
            cores = set(range(jobs)) - {core for _, core in running.values()}
            waiting = [cell for cell in ready_cells(study, done) if cell.arm in arms]
            waiting = [cell for cell in waiting if cell not in running]
            for cell, core in zip(waiting, sorted(cores), strict=False):
                running[cell] = launch(study, file, cell, out, done, core), core
                print(f"{time.strftime('%H:%M:%S')}  {cell.key}", flush=True)
        for process, _ in running.values() if stopped else ():
            process.terminate()  # each saves at its next step
        if not running:
            break
        time.sleep(2)
        for cell, (process, _) in list(running.items()):
            if process.poll() is None:
                continue
            del running[cell]
            if process.returncode and not stopped:
                stopped.append(process.returncode)
                print(f"{cell.key} failed ({process.returncode}); see its log", file=sys.stderr)
            write_results(study, collect(study, out))
    done = finished_losses(study, out)
    print(f"{len(done)} of {count_cells(study)} cells are done")
    return len(done) == count_cells(study)


def launch(study, file, cell: Cell, out, done, core: int | None, run_dir=None) -> subprocess.Popen:
    """Returns a training on one core of its own; its output goes beside its run directory."""
    changes = overrides_of(study, cell, out, done)
    if run_dir is not None:
        changes[0] = f"run.dir={run_dir}"
    log = pathlib.Path(changes[0].removeprefix("run.dir=") + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "drlora_jax.train", "--config", str(file), *changes]

    with log.open("a") as handle:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=handle,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches this program only, which then asks each to save
        )
    if core is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process.pid, {cores[core % len(cores)]})
    return process


def again(study: Study, file: pathlib.Path, out: pathlib.Path, name: str) -> int:
    """Trains a finished cell from nothing and says whether the number comes out again."""
    task, arm, seed = name.split("/")
    done = finished_losses(study, out)
    cell = Cell(task, arm, tuned_rate(study, task, arm, done), int(seed), False)
    run_dir = out / "again" / f"{cell.key}-{time.strftime('%Y%m%d-%H%M%S')}"
    code = launch(study, file, cell, out, done, 0, run_dir).wait()
    if code:
        print(f"it failed ({code}); see {run_dir}.log", file=sys.stderr)
        return 1
    before, now = done[cell], read_cell(run_dir)["test_loss"]
    verdict = "the same number" if before == now else f"DIFFERENT by {now - before:g}"
    print(f"{name}: {before!r} before, {now!r} now: {verdict}")
    return 0 if before == now else 1


if __name__ == "__main__":
    sys.exit(main())
