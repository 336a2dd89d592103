"""Rows of files: what is read, and the message for every kind of broken file."""

import gzip
import json
import sys
import types

import pytest

from drlora_jax.data import sources
from drlora_jax.data.sources import read_rows
from drlora_jax.errors import UserError

ROWS = [{"prompt": "a\u2028b", "response": "é"}, {"prompt": "c", "response": "d"}]


def _lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _write(folder, name: str, content: bytes) -> str:
    file = folder / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(file)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_json_lines(tmp_path, name):
    path = _write(tmp_path, name, _lines(ROWS))
    rows = list(read_rows(path))
    assert [row.fields for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_json_list(tmp_path, name):
    path = _write(tmp_path, name, json.dumps(ROWS, indent=1).encode())
    rows = list(read_rows(path))
    assert [row.fields for row in rows] == ROWS
    assert rows[1].where == f"{path} row 2"


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": None}]
    parquet.write_table(arrow.Table.from_pylist(messages), tmp_path / "x.parquet")
    rows = list(read_rows(str(tmp_path / "x.parquet")))
    assert [row.fields for row in rows] == messages
    assert rows[0].where == f"{tmp_path / 'x.parquet'} row 1"


def test_blank_lines_mark_and_line_ends(tmp_path):
    path = _write(tmp_path, "x.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert [(row.where, row.fields) for row in read_rows(path)] == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:3", {"a": 2}),
    ]


def test_several_files_in_order(tmp_path):
    paths = [_write(tmp_path, f"{i}.jsonl", _lines([{"i": i}])) for i in (2, 0, 1)]
    assert [row.fields["i"] for row in read_rows(paths)] == [2, 0, 1]


def test_bundled(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    _write(tmp_path / "set", "train.jsonl", _lines(ROWS))
    monkeypatch.setattr(sources, "BUNDLED", tmp_path)
    rows = list(read_rows("bundled:set/train.jsonl"))
    assert rows[0].where == "bundled:set/train.jsonl:1"
    for name in ("bundled:set/nope.jsonl", "bundled:../x.jsonl"):
        with pytest.raises(UserError, match="no such file; it has bundled:set/train.jsonl"):
            list(read_rows(name))


def _fake_datasets(monkeypatch, load_dataset) -> None:
    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_datasets_name(monkeypatch):
    asked = []
    _fake_datasets(monkeypatch, lambda name, split: asked.append((name, split)) or ROWS)
    rows = list(read_rows("owner/name", split="test"))
    assert asked == [("owner/name", "test")]
    assert rows[1] == ("owner/name[test] row 2", ROWS[1])


def test_datasets_name_with_a_configuration(monkeypatch):
    asked = []
    _fake_datasets(monkeypatch, lambda *names, split: asked.append((*names, split)) or ROWS)
    rows = list(read_rows("owner/name:main", split="test"))
    assert asked == [("owner/name", "main", "test")]
    assert rows[0].where == "owner/name:main[test] row 1"
    for name in ("owner/name:", ":main"):
        with pytest.raises(UserError, match="write NAME, or NAME:CONFIG"):
            list(read_rows(name))


def test_datasets_rows_that_stop_coming(monkeypatch):
    def broken(name, split):
        yield ROWS[0]
        raise ConnectionError("gone")

    _fake_datasets(monkeypatch, broken)
    with pytest.raises(UserError, match="does not load: ConnectionError: gone"):
        list(read_rows("owner/name"))


def test_a_row_larger_than_any_document(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(sources, "MAX_LIST_BYTES", 300)
    fits = _write(tmp_path, "fits.jsonl", b'{"a": "' + b"x" * 90 + b'"}\n' * 2)
    with pytest.raises(UserError, match=r"fits.jsonl:2: not JSON"):
        list(read_rows(fits))
    for name in ("x.jsonl", "x.jsonl.gz"):
        path = _write(tmp_path, name, b'{"a": 1}\n{"a": "' + b"x" * 100 + b'"}\n')
        with pytest.raises(UserError, match=rf"{name}:2: a row of more than"):
            list(read_rows(path))
    path = _write(tmp_path, "x.json", json.dumps([{"a": "x" * 300}]).encode())
    with pytest.raises(UserError, match="in one list; write it as .jsonl"):
        list(read_rows(path))


def test_datasets_name_without_network(monkeypatch):
    def fail(name, split):
        raise ConnectionError("no route\nlong trace")

    _fake_datasets(monkeypatch, fail)
    with pytest.raises(UserError, match="does not load: ConnectionError: no route. Give a local"):
        list(read_rows("owner/name"))


def test_package_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(read_rows("owner/name"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \xff}\n', r"x.jsonl:2: not UTF-8, got byte 0xff"),
        ("x.json", b'[{"a": 1},\n{"a": \xff}]', r"x.json:2: not UTF-8"),
        ("x.jsonl", b'{"a": 1}\n{"a" 2}\n', r"x.jsonl:2: not JSON at column 6 \(Expecting ':'"),
        ("x.json", b'[{"a": 1},\n {"a" 2}]', r"x.json:2: not JSON at column 7"),
        ("x.jsonl", b"[" * 100_000, r"x.jsonl:1: not JSON that can be read"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', r"x.jsonl:2: a row must be an object, got list"),
        ("x.json", b'[{"a": 1}, 3]', r"x.json row 2: a row must be an object, got int"),
        ("x.jsonl", b"\n\n", r"x.jsonl has no rows"),
        ("x.jsonl", b"", r"x.jsonl has no rows"),
        ("x.json", b"[]", r"x.json has no rows"),
        ("x.txt", b"abc", r"x.txt: unknown kind of file; known are .jsonl"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        list(read_rows(_write(tmp_path, name, content)))


def test_broken_containers(tmp_path):
    whole = gzip.compress(_lines(ROWS * 100))
    for content in (b"plain text", whole[: len(whole) // 2]):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="x.jsonl.gz cannot be read: .* Is the file whole"):
            list(read_rows(str(tmp_path / "x.jsonl.gz")))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="x.parquet cannot be read as Parquet"):
        list(read_rows(str(tmp_path / "x.parquet")))


def test_missing_files(tmp_path):
    _write(tmp_path, "train.jsonl", _lines(ROWS))
    with pytest.raises(UserError, match="trian.jsonl: no such file; did you mean .*/train.jsonl?"):
        list(read_rows(str(tmp_path / "trian.jsonl")))
    with pytest.raises(UserError, match="zzz.json: no such file; the folder .* has train.jsonl"):
        list(read_rows(str(tmp_path / "zzz.json")))
    with pytest.raises(UserError, match="its folder .*gone does not exist either"):
        list(read_rows(str(tmp_path / "gone" / "train.jsonl")))
    with pytest.raises(UserError, match="is a directory; give one of its files: train.jsonl"):
        list(read_rows(str(tmp_path)))
