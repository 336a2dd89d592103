"""The command line as a user meets it: exit codes and messages."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from drlora_jax import cli, convert, export, inspect, report, train
from drlora_jax.errors import UserError
from drlora_jax.evaluation import compare
from tests.support.tiny import MIXTRAL, write_rows, write_tiny_model

ROOT = pathlib.Path(__file__).parents[1]


def run_cli(*arguments, module="drlora_jax.train", cwd=ROOT, **more):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    flags = os.environ["XLA_FLAGS"].split()
    one_device = " ".join(flag for flag in flags if "device_count" not in flag)
    environment = os.environ | {"XLA_FLAGS": one_device} | more
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_model(folder / "mixtral", MIXTRAL)
    write_rows(folder / "rows.jsonl", 40)
    (folder / "empty.jsonl").write_text("")
    (folder / "no_field.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    small = write_tiny_model(folder / "small_vocabulary", MIXTRAL | {"vocab_size": 512})
    assert small.is_dir()
    other = folder / "unsupported"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(MIXTRAL))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    return folder


def mixtral_arguments(files, *more):
    return (
        "--config",
        "configs/mixtral.py",
        f"model.path={files / 'mixtral'}",
        f"data.path={files / 'rows.jsonl'}",
        f"data.eval_path={files / 'rows.jsonl'}",
        "train.micro_batches=2",
        "data.prompt_field=prompt",
        "data.response_field=response",
        *more,
    )


def test_a_launcher_may_tell_failures_from_lost_peers(files):
    arguments = mixtral_arguments(files, "train.steps=0")
    assert run_cli(*arguments).returncode == 2
    assert run_cli(*arguments, DRLORA_FAILURE_OFFSET="100").returncode == 102


@pytest.mark.parametrize("module", ["evaluate", "generate"])
def test_a_platform_that_is_not_there_is_one_line(module):
    arguments = dict(evaluate=["--tasks", "loss=bundled:gsm8k/heldout.jsonl"], generate=[])[module]
    arguments = ["--model", "bundled:tiny_moe", *arguments]
    result = run_cli(*arguments, module=f"drlora_jax.{module}", JAX_PLATFORMS="nonsense")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: jax finds no device") and "JAX_PLATFORMS" in line


def test_the_mixtral_config_runs_on_a_tiny_model(files, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run = files / "run"
    arguments = mixtral_arguments(
        files,
        f"run.dir={run}",
        "train.steps=6",
        "train.batch_size=4",
        "train.sequence_length=64",
        "train.eval_every=6",
        "allocation.interval=1",
        "allocation.p_grow=0.2",
    )
    result = run_cli(*arguments)
    assert result.returncode == 0, result.stderr
    assert "LoRA, rank up to 32" in result.stdout and "trained after warm-up" in result.stdout
    ranks = [json.loads(line) for line in (run / "ranks.jsonl").read_text().splitlines()]
    assert [sum(layer) for layer in ranks[-1]["ranks"]] == [4 * 16] * 2
    assert result.stdout.index("compiling the train step") < result.stdout.index("compiled in")
    assert train.main([*arguments, "mesh.expert=1"]) == 0
    assert "already complete" in capsys.readouterr().out


def test_dry_run_writes_nothing(files, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = mixtral_arguments(
        files,
        f"run.dir={files / 'dry'}",
        "train.batch_size=4",
        "train.sequence_length=64",
        "mesh.expert=1",
        "--dry-run",
    )
    assert train.main(list(arguments)) == 0
    assert "the compiled step adds" in capsys.readouterr().out and not (files / "dry").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stepz=3", "did you mean train.steps"),
        ("train.steps=three", "train.steps must be int | none, got 'three'"),
        ("allocation.r_max=4", "r_init <= r_target <= r_max"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("model.path=/no/such/model", "no such directory"),
        ("model.path=FILES/unsupported", "model_type 'mamba' is not supported"),
        ("model.path=FILES/pickled", "pickle files are not read"),
        ("model.path=FILES/small_vocabulary", "512"),
        ("data.path=FILES/empty.jsonl", "empty"),
        ("data.path=FILES/no_field.jsonl", "no_field.jsonl:2"),
        ("allocation.interval=45", "budget cannot be reached"),
        ("adapter.targets=q,v", "adapts no expert"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(files, override, message, capsys):
    override = override.replace("FILES", str(files))
    never = files / "never"
    arguments = mixtral_arguments(
        files, f"run.dir={never}", "mesh.expert=1", "train.steps=50", "allocation.interval=5"
    )
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: train.main([*arguments, "data.bad_rows=stop", override]))
    assert end.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert message in errors[-1]
    assert not never.exists()


def test_a_mistake_shows_no_traceback(files):
    result = run_cli("--config", "configs/tiny.py", "train.stepz=3")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: Unknown config field train.stepz")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", "caf\udcc3\udca9"], "The prompt is not UTF-8 at character 4"),
        (["--prompt=\udcff"], "The prompt is not UTF-8"),
        (["--stop", "\udcff"], "--stop is not UTF-8"),
        (["--run=\udcff"], "--run is not UTF-8"),
        (["\udcff"], "Argument 1 is not UTF-8"),
    ],
)
def test_text_that_is_not_utf_8_is_refused(arguments, named):
    """Python gives bytes of an argument that it can not decode as lone surrogates."""
    parser = cli.model_parser("generate", "")
    parser.add_argument("--prompt")
    parser.add_argument("--stop")
    with pytest.raises(UserError, match=named):
        parser.parse_args(arguments)


def test_overrides_that_are_not_utf_8_are_refused():
    for override in ("data.path=\udcff.jsonl", "data.prompt_field=a\udce9"):
        name = override.partition("=")[0]
        with pytest.raises(UserError, match=f"{name} is not UTF-8 at character .*PYTHONUTF8=1"):
            cli.parse_arguments("train", "", ["--config", "bundled:tiny", override])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (convert, [], "The following arguments are required: direction. See"),
        (convert, ["import", "--adapter", "x"], "required: --model, --out. See"),
        (convert, ["export", "--weights", "npz"], "Argument --weights: invalid choice: 'npz'"),
        (convert, ["export", "--run", "r", "--out", "o", "--fast"], "arguments: --fast. See"),
        (export, ["--run", "r", "--format", "gguf"], "Argument --format: invalid choice: 'gguf'"),
        (inspect, [], "required: DIR. See"),
        (report, ["r"], "required: --run. See"),
        (compare, ["a.jsonl"], "required: B.jsonl. See"),
    ],
)
def test_arguments_that_can_not_be_parsed_are_one_line(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: command.main(arguments))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert f"See python -m {command.__name__}" in line


def test_every_command_refuses_arguments_that_are_not_utf_8(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "--out", "\udcff"])
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: pytest.fail("it was started"))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out is not UTF-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_of_any_encoding_shows_everything(encoding, monkeypatch):
    """What the encoding lacks is escaped; UTF-8 lacks half a surrogate pair."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    texts = "é \U0001f600 \udcff"

    def main():
        print(texts)
        raise UserError(texts)

    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(main)
    assert end.value.code == 2
    shown = []
    for stream in streams.values():
        stream.flush()
        shown.append(stream.buffer.getvalue().decode(encoding))
    plain = texts.encode(encoding, "backslashreplace").decode(encoding)
    assert shown == [f"{plain}\n", f"error: {cli.printable(plain)}\n"]


def test_a_stream_that_is_no_text_file_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: 0)
    assert end.value.code == 0


@pytest.mark.parametrize("advice", [None, cli.TRAINING_ADVICE])
def test_what_to_do_about_memory_is_of_the_command(advice, capsys):
    def main():
        raise MemoryError

    with pytest.raises(SystemExit):
        cli.run_and_exit(main, **({"memory_advice": advice} if advice else {}))
    message = capsys.readouterr().err
    assert ("run.dir" in message) == (advice is not None)
    assert ("--batch-size" in message) == (advice is None)


def test_an_interrupted_command_can_be_started_again(capsys):
    """In a process that did not start as a command of ours, Ctrl-C is Python's exception."""

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(main)
    assert end.value.code == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped: interrupted; run the same command again")


def test_help_lists_every_field():
    result = run_cli("--help")
    assert result.returncode == 0
    for name in ("train.steps", "allocation.p_grow", "mesh.expert", "data.template"):
        assert name in result.stdout


OUTPUT = """
from drlora_jax import cli
from drlora_jax.system import early
early.install()
def main():
    for number in range(20):
        print("line é", number, flush=True)
    return 0
cli.run_and_exit(main, outlives_output={})
"""


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("broken", ["pipe", "full disk"])
def test_output_that_breaks(broken, goes_on):
    command = [sys.executable, "-c", OUTPUT.format(goes_on)]
    if broken == "pipe":
        reader, stdout = os.pipe()
        os.close(reader)
    else:
        stdout = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(stdout)
    reason = "Broken pipe" if broken == "pipe" else "No space left on device"
    if goes_on:
        assert done.stderr == f"warning: standard output is lost ({reason}); the run continues\n"
    elif broken == "pipe":
        assert done.stderr == "stopped: standard output was closed by its reader\n"
    else:
        assert done.stderr.splitlines()[-1].startswith("failed: ") and reason in done.stderr
    assert done.returncode == (0 if goes_on else 1)


def test_output_that_may_break_is_whole():
    command = [sys.executable, "-c", OUTPUT.format(True)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"line é {number}" for number in range(20)]
