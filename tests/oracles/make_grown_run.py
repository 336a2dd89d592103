"""Makes `data/grown_run.tar.gz` and `data/grown_run.json` with the code of an older commit:

git worktree add /tmp/old 5dd1421 && python tests/oracles/make_grown_run.py /tmp/old

The archive holds a small model, its rows and a run of DR-LoRA that SIGTERM stopped after two growth
events and before its last step. The JSON holds what the same code computed without the stop.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
import tarfile
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

import tests.conftest  # noqa: E402, F401  (the same flags of XLA as in the tests)
from tests.oracles.grown_run import ARCHIVE, RESULTS, STOPPED_AT, TRAIN, machine, result_of  # noqa: E402

LEVELS = 4  # of a weight per standard deviation: few enough for the archive to be small


def write_inputs(tiny) -> None:
    tiny.write_rows(pathlib.Path("train.jsonl"), 48)
    tiny.write_rows(pathlib.Path("heldout.jsonl"), 8, seed=1)
    exact = tiny.random_params

    def coarse(config):
        def rounded(leaf):
            unit = np.std(leaf) / LEVELS or 1.0
            return np.round(leaf / unit).astype(np.float32) * np.float32(unit)

        return jax.tree.map(rounded, exact(config))

    tiny.random_params = coarse
    tiny.write_tiny_model(pathlib.Path("model"))


def stopping(stop_signals: type) -> type:
    """`StopSignals` of a run that gets SIGTERM in the step after which it shall stop."""

    class Stopping(stop_signals):
        def reached(self, step: int) -> bool:
            if step == STOPPED_AT:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().reached(step)

    return Stopping


def main(checkout: str) -> None:
    sys.path[:1] = [checkout, str(pathlib.Path(checkout, "tests"))]
    import tiny

    from drlora_jax import train
    from drlora_jax.errors import EXIT_DONE, EXIT_RESUMABLE

    assert pathlib.Path(train.__file__).is_relative_to(checkout), train.__file__
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_inputs(tiny)
        assert train.main([*TRAIN, "run.dir=whole"]) == EXIT_DONE
        train.StopSignals = stopping(train.StopSignals)
        assert train.main([*TRAIN, "run.dir=run"]) == EXIT_RESUMABLE
        stored = {"machine": machine(), **result_of(pathlib.Path("whole"))}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree("whole")
        pathlib.Path("run/report.html").unlink()
        with tarfile.open(ARCHIVE, "w:gz") as archive:
            archive.add(".", filter=lambda entry: entry if entry.name != ".lock" else None)
    print(ARCHIVE, ARCHIVE.stat().st_size)


if __name__ == "__main__":
    main(str(pathlib.Path(sys.argv[1]).resolve()))
