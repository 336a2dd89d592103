"""Paths that users name: addresses, and files that did not come."""

import pathlib
from unittest import mock

import pytest

from drlora_jax import alpha, cli, evaluate, export, generate, inspect, report
from drlora_jax.config import PLACES, TrainConfig, apply_overrides, load_config
from drlora_jax.errors import RunError, UserError
from drlora_jax.system import paths
from drlora_jax.system.paths import check_downloaded, kind_of, local_path, read_json

POINTERS = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:0f1e\nsize 1234\n",
    "version https://hawser.github.com/spec/v1\noid sha256:0f1e\nsize 1234\n",
)
BUCKETS = ("gs://b/x", "S3://b/x", "hdfs://h:9000/x", "abfss://c@a.core/x", "memory://x")
BUCKETS += ("gs:/b/x", "S3:/b/x", "abfss:/c@a.core/x")
OTHERS = (
    "https://h/x?a=b#c",
    "HTTP://h",
    "ftp://h/x",
    "hf://datasets/a/b",
    "https:/h/x",
    "hf:/a/b",
)


@pytest.mark.parametrize("url", BUCKETS)
@pytest.mark.parametrize(
    ("option", "shown"), [("run.dir", "run.dir="), ("--out", "--out "), ("", "")]
)
def test_buckets_are_refused_as_they_were_given(url, option, shown):
    with pytest.raises(UserError) as caught:
        local_path(url, option)
    message = str(caught.value)
    assert message.startswith(f"{shown}{url} is a URL, but buckets are neither read nor")
    assert "launch/README.md, Buckets" in message
    assert "## Buckets" in (pathlib.Path(__file__).parents[2] / "launch/README.md").read_text()


@pytest.mark.parametrize("url", OTHERS)
def test_other_addresses_are_refused(url):
    with pytest.raises(UserError, match="only local paths are opened; download it") as caught:
        local_path(url, "data.path")
    assert f"data.path={url} is" in str(caught.value)
    assert ("OWNER/NAME" in str(caught.value)) == url.startswith("hf")


@pytest.mark.parametrize("name", ["a b", "ä", "a%20b", "plain", "c#d?e"])
def test_file_addresses_are_paths(tmp_path, name):
    path = tmp_path / name
    url = path.as_uri()
    assert local_path(url, "--out") == path
    assert local_path(url.replace("file://", "FILE://localhost")) == path
    assert local_path(url.replace("file://", "file:")) == path


def test_file_addresses_of_elsewhere(tmp_path):
    with pytest.raises(
        UserError, match=r"--out file://a/b is not a URL of .* slashes: file:///a/b"
    ):
        local_path("file://a/b", "--out")


@pytest.mark.parametrize("path", ["a", "/a/b", "C:/x", "owner/name:main", "a:b", "x//y", "./s3:/b"])
def test_paths_are_paths(path):
    assert local_path(path) == pathlib.Path(path)


def test_the_home_of_nobody_is_a_path_that_is_not_there():
    assert kind_of(local_path("~nobody-of-that-name/a")) == "absent"
    assert local_path("~/a") == pathlib.Path.home() / "a"


def test_a_path_that_looks_like_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gs:" / "b").mkdir(parents=True)
    assert local_path("gs:/b") == pathlib.Path("gs:/b")
    for url in ("gs:/b/x", "gs://b"):
        with pytest.raises(UserError, match=f"{url} is a URL"):
            local_path(url)


FIELDS = {
    "run.dir": [],
    "model.path": [],
    "data.path": [],
    "data.eval_path": [],
    "allocation.pattern": ["allocation.kind=pattern"],
    "allocation.alpha_file": ["allocation.spectral_prior=1"],
    "adapter.experts_per_layer": ["adapter.kind=mola"],
}


def test_no_field_is_forgotten():
    assert set(FIELDS) == set(PLACES)


@pytest.mark.parametrize("url", ["gs://b/x", "gs:/b/x"])
@pytest.mark.parametrize(("name", "more"), FIELDS.items())
def test_every_field_that_names_a_path(tmp_path, name, more, url):
    file = tmp_path / "c.py"
    file.write_text("from drlora_jax.config import *\ndef get_config(): return TrainConfig()\n")
    with pytest.raises(UserError, match=f"{name}={url} is a URL"):
        load_config(str(file), [f"{name}={url}", *more])
    assert apply_overrides(TrainConfig(), [f"{name}={url}", *more])  # a stored run may have it


TINY = ("--model", "bundled:tiny_moe")
COMMANDS = [
    (generate, ["--run", "gs://b/x", "--prompt", "a"], "--run"),
    (generate, ["--model", "gs://b/x", "--prompt", "a"], "--model"),
    (evaluate, ["--run", "gs://b/x", "--tasks", "loss"], "--run"),
    (evaluate, ["--model", "gs://b/x", "--tasks", "gsm8k=bundled:gsm8k/train.jsonl"], "--model"),
    (evaluate, [*TINY, "--tasks", "gsm8k", "--out", "gs://b/x"], "--out"),
    (
        evaluate,
        [*TINY, "--tasks", "gsm8k", "--data-dir", "gs://b/x"],
        "--data",
    ),
    (evaluate, [*TINY, "--tasks", "gsm8k=gs://b/x"], "gs://b/x"),
    (evaluate, [*TINY, "--loss", "gs://b/x"], "gs://b/x"),
    (export, ["--run", "gs://b/x", "--format", "peft", "--out", "x"], "--run"),
    (export, ["--run", "x", "--format", "peft", "--out", "gs://b/x"], "--out"),
    (report, ["--run", "gs://b/x"], "--run"),
    (report, ["--run", "x", "--out", "gs://b/x"], "--out"),
    (alpha, ["gs://b/x", "--experts", "8"], "MODEL"),
    (alpha, ["bundled:tiny_moe", "--experts", "8", "--out", "gs://b/x"], "--out"),
    (alpha, ["bundled:tiny_moe", "--experts", "8", "--svg", "gs://b/x"], "--svg"),
    (alpha, ["bundled:tiny_moe", "--experts", "8", "--cache", "gs://b/x"], "--cache"),
    (inspect, ["gs://b/x"], "DIR"),
]


@pytest.mark.parametrize("url", ["gs://b/x", "gs:/b/x"])
@pytest.mark.parametrize(
    ("module", "argv", "option"),
    COMMANDS,
    ids=[f"{module.__name__.rpartition('.')[2]} {option}" for module, _, option in COMMANDS],
)
def test_every_option_that_names_a_path(module, argv, option, url, tmp_path, monkeypatch, capsys):
    argv, option = [each.replace("gs://b/x", url) for each in argv], option.replace("gs://b/x", url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "drlora_jax.inference.model.load_params", lambda *_, **__: pytest.fail("work")
    )
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: module.main(argv))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and f"{url} is a URL" in lines[-1], lines
    assert option in lines[-1] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pointer", POINTERS)
def test_pointers_of_git_lfs(tmp_path, pointer):
    file = tmp_path / "config.json"
    file.write_text(pointer)
    for look in (check_downloaded, read_json):
        with pytest.raises(UserError, match=f"{file} is a git-lfs pointer.*git lfs pull. in "):
            look(file)
    file.write_text('{"version": "https://git-lfs.github.com/spec/v1"}')
    check_downloaded(file)
    check_downloaded(tmp_path / "absent")
    check_downloaded(tmp_path)


PAGES = ("<!DOCTYPE html>\n<title>Sign in</title>", "\ufeff\n<html lang=en>" + "a" * 9999)
PAGES += ("<!-- a --><!--b-->\n<!doctype HTML>", '<?xml version="1.0"?><!DOCTYPE html><html/>')
ERRORS = (
    '<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code><Message>No</Message></Error>\n',
    '{"error": "Repository not found"}',
    '{"message": "Not Found", "documentation_url": "https://x", "status": "404"}',
    "404: Not Found",
    "Entry not found\n",
    "Access to model a/b is restricted and you are not in the authorized list.",
    "Invalid username or password.",
)
FILES = (
    '{"error": "x", "prompt": "why?", "response": "so"}',
    '{"message": "a text"}',
    '{"model_type": "olmoe", "status": "x"}',
    '["error"]',
    "{",
    "",
    "<|im_start|>{{ html }}",
    "<h1>A</h1>",
    "prompt,response\nnot found,why\n",
    "<!-- " * 900,
    '{"error": "' + "a" * 5000 + '"}',
)


@pytest.mark.parametrize("content", [*PAGES, *ERRORS])
def test_answers_of_servers_are_no_files(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    what = r"a web page \(HTML\)" if content in PAGES else "the error message of a server .'.*'."
    for look in (check_downloaded, read_json):
        with pytest.raises(UserError, match=f"{file} is {what}, not the .*: download it again"):
            look(file)
    check_downloaded(file, takes_pages=True)


@pytest.mark.parametrize("content", FILES)
def test_files_that_look_a_little_like_such_answers(tmp_path, content):
    (tmp_path / "a").write_text(content)
    check_downloaded(tmp_path / "a")


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "log.jsonl"
    paths.replace_text(file, "one")
    with pytest.raises(UnicodeEncodeError):
        paths.replace_text(file, "\udc80")
    monkeypatch.setattr(paths.os, "replace", mock.Mock(side_effect=OSError(28, "disk is full")))
    with pytest.raises(RunError, match="log.jsonl cannot be written: disk is full"):
        paths.write_result(file, "two")
    assert file.read_text() == "one" and [each.name for each in tmp_path.iterdir()] == [file.name]


def test_numbered_folders_are_listed_in_order(tmp_path):
    for name in ("10", "9", "12.tmp", "best", "²"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").touch()
    assert paths.numbered_folders(tmp_path) == [9, 10]
    assert paths.numbered_folders(tmp_path / "absent") == []
