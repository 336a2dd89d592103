"""The scripts of launch/, with stand-ins for the programs of a cluster."""

import os
import pathlib
import subprocess
import sys

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


# A process of a training that is lost: the one named hangs, the others notice and end.
HANGING = """
import os, signal, sys, time
own, hung, code = os.environ["JAX_PROCESS_ID"], *sys.argv[1:]
if own == hung:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(0.2)
sys.exit(int(code))
"""


def run_local(folder, program, *arguments, processes=2, **more):
    (folder / "lost.py").write_text(program)
    command = [sys.executable, str(LAUNCH / "local.py"), "--processes", str(processes)]
    command += ["--grace", "1", "--module", "lost", "--", *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.Popen(command, env=environment, cwd=folder, **more)


@pytest.mark.parametrize(
    "hung, others, processes, code",
    [("0", "75", 2, 75), ("1", "75", 2, 75), ("1", "0", 3, 137)],
)
def test_a_process_that_hangs_is_ended(tmp_path, hung, others, processes, code):
    """Whichever of them it is; 137 is that of the one that had to be killed."""
    launcher = run_local(tmp_path, HANGING, hung, others, processes=processes)
    assert launcher.wait(timeout=60) == code


def test_signals_go_to_all_processes(tmp_path):
    program = "import signal, sys, time\n"
    program += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    program += "print('ready', flush=True)\ntime.sleep(60)\n"
    launcher = run_local(tmp_path, program, "x", stdout=subprocess.PIPE)
    assert [launcher.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
    launcher.terminate()
    assert launcher.wait(timeout=60) == 75
    launcher.stdout.close()
