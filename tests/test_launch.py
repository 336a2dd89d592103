"""The scripts of launch/, with stand-ins for the programs of a cluster."""

import os
import pathlib
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"

# Like srun: runs the task once for each code, and returns the highest.
SRUN = """#!/usr/bin/env bash
shift  # its own option
highest=0
for code in $CODES; do
    CODE=$code "$@"
    got=$?
    [ "$got" -gt "$highest" ] && highest=$got
done
exit "$highest"
"""
PYTHON = """#!/usr/bin/env bash
echo "$@" >> arguments.txt
case "$CODE" in 1 | 2) CODE=$((CODE + DRLORA_FAILURE_OFFSET)) ;; esac
exit "$CODE"
"""
RECORDER = """#!/usr/bin/env bash
echo "$@" >> "$(basename "$0").txt"
"""


def write_program(file: pathlib.Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", RECORDER), ("gcloud", RECORDER)):
        write_program(tmp_path / "bin" / name, text)
    write_program(tmp_path / ".venv" / "bin" / "python", PYTHON)
    return tmp_path


def run_script(cluster, name, *arguments, **environment):
    settings = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_ID": "7", "HOME": str(cluster)}
    settings |= {"PATH": f"{cluster / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        env=settings | environment,
        cwd=cluster,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_slurm_signals_the_training_itself(cluster):
    """It signals a task, not what the task has started: no shell in between."""
    program = '#!/usr/bin/env bash\necho "$2" > task.txt\n'
    write_program(cluster / "bin" / "srun", program)
    run_script(cluster, "slurm.sbatch", "--config", "c.py")
    assert (cluster / "task.txt").read_text().strip() == str(cluster / ".venv/bin/python")


@pytest.mark.parametrize(
    "codes, restarts, code, is_requeued",
    [
        ("0 0", "", 0, False),
        ("75 75", "", 75, True),  # stopped, all saved
        ("75 137", "", 137, False),  # killed by hand
        ("75 1", "", 1, False),  # one failed: the other only lost it
        ("2 75", "3", 2, False),
        ("75 75", "19", 75, True),
        ("75 75", "20", 75, False),  # a crash that comes back
    ],
)
def test_slurm_goes_on_only_with_what_can_go_on(cluster, codes, restarts, code, is_requeued):
    more = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    arguments = ["--config", "a config.py", "mesh.expert=8"]
    done = run_script(cluster, "slurm.sbatch", *arguments, CODES=codes, **more)
    assert done.returncode == code, done.stderr
    (line, *_) = (cluster / "arguments.txt").read_text().splitlines()
    assert line == "-u -m drlora_jax.train --config a config.py mesh.expert=8"
    assert (cluster / "scontrol.txt").exists() == is_requeued


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["all"], {"MOUNT": "bucket"}, "--config FILE.py"),
        (["all", "--config", "c.py"], {}, "set MOUNT=BUCKET, or RUN_DIR"),
        (["collect"], {}, "set MOUNT=BUCKET, or RUN_DIR"),
        ([], {}, "usage:"),
        (["start"], {}, "usage:"),
    ],
)
def test_a_slice_is_not_asked_for_what_would_be_refused(cluster, arguments, environment, message):
    done = run_script(cluster, "tpu_pod.sh", *arguments, **environment)
    assert done.returncode == 2 and message in done.stderr
    assert not (cluster / "gcloud.txt").exists()


def test_training_on_a_slice_gets_its_arguments(cluster):
    arguments = ["run", "--config", "c.py", "data.path=a b.jsonl"]
    done = run_script(cluster, "tpu_pod.sh", *arguments, MOUNT="bucket", NAME="mine")
    assert done.returncode == 0, done.stderr
    sent = (cluster / "gcloud.txt").read_text()
    assert "--worker=all" in sent and "drlora_jax.train --config c.py" in sent
    assert "data.path=a\\ b.jsonl run.dir=/mnt/runs/mine" in sent
