"""Rows of one file: what is read, and the message for every kind of broken file."""

import bz2
import csv
import gzip
import json
import lzma
import pathlib

import pytest

from drlora_jax.data import file_readers
from drlora_jax.data.file_readers import read_file
from drlora_jax.data.sources import read_rows
from drlora_jax.errors import UserError

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKERS[".zst"] = lambda content: pytest.importorskip("pyarrow").compress(content, "zstd", True)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 9\n"
ROWS = [{"prompt": "a\u2028b", "response": "é"}, {"prompt": "c", "response": "d"}]
PACKED = ["x.jsonl.gz", "x.json.gz", "x.jsonl.GZ", "x.jsonl.zst", "x.jsonl.bz2", "x.jsonl.xz"]


def _lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _write(folder, name: str, content: bytes) -> str:
    file = folder / name
    file.write_bytes(PACKERS.get(file.suffix.lower(), bytes)(content))
    return str(file)


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson", "x.json", *PACKED])
def test_json_lines(tmp_path, name):
    path = _write(tmp_path, name, _lines(ROWS))
    rows = list(read_rows(path))
    assert [row.fields for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["x.json", "x.Json", "x.json.gz", "x.json.zst"])
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


def test_a_row_larger_than_any_document(tmp_path, monkeypatch):
    monkeypatch.setattr(file_readers, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(file_readers, "MAX_LIST_BYTES", 300)
    fits = _write(tmp_path, "fits.jsonl", b'{"a": "' + b"x" * 90 + b'"}\n' * 2)
    with pytest.raises(UserError, match=r"fits.jsonl:2: not JSON"):
        list(read_rows(fits))
    for name in ("x.jsonl", "x.jsonl.gz"):
        path = _write(tmp_path, name, b'{"a": 1}\n{"a": "' + b"x" * 100 + b'"}\n')
        with pytest.raises(UserError, match=rf"{name}:2: the row has more than"):
            list(read_rows(path))
    path = _write(tmp_path, "x.json", json.dumps([{"a": "x" * 300}]).encode())
    with pytest.raises(UserError, match="in one list; write it as .jsonl"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \xff}\n', r"x.jsonl:2: not UTF-8, got byte 0xff"),
        ("x.json", b'[{"a": 1},\n{"a": \xff}]', r"x.json:2: not UTF-8"),
        ("x.jsonl", b'{"a": 1}\n{"a" 2}\n', r"x.jsonl:2: not JSON at column 6 \(Expecting ':'"),
        ("x.json", b'[{"a": 1},\n {"a" 2}]', r"x.json:2: not JSON at column 7"),
        ("x.jsonl", b"[" * 100_000, r"x.jsonl:1: this JSON cannot be read"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', r"x.jsonl:2: a row must be an object, got list"),
        ("x.json", b'[{"a": 1}, 3]', r"x.json row 2: a row must be an object, got int"),
        ("x.jsonl", b"\n\n", r"x.jsonl has no rows"),
        ("x.jsonl", b"", r"x.jsonl has no rows"),
        ("x.json", b"[]", r"x.json has no rows"),
        ("x.jsonl", b'[{"a": 1}]\n', r"x.jsonl:1: .* got a list; name the file .json"),
        (
            "x.jsonl",
            b'[\n{"a": 1}\n]\n',
            r"x.jsonl:1: the line is only '\[', so the file is one JSON value",
        ),
        (
            "x.jsonl",
            b'{\n"a": 1\n}\n',
            r"x.jsonl:1: the line is only '{', so the file is one JSON value",
        ),
        (
            "x.json",
            b'{\n"a": 1\n}\n',
            r"x.json is one JSON object over several lines, with a \(int\); wrap it in",
        ),
        ("x.json", b'{"a": [1],\n"b": [2]}', r"x.json is one JSON .* with a \(list\), b \(list\)"),
        ("x.txt", b"abc", r'x.txt: a text file does not tell .* {"text": ...} per document'),
        ("x.zip", b"abc", r"x.zip: unknown file type; known are .jsonl, .*\(also with .gz"),
        ("x", b"abc", r"x: unknown file type"),
        ("x.csv", b"a;b\n1;2\n", r"x.csv:1: the names 'a;b' are not separated"),
        ("x.tsv", b"a,b\n1,2\n", r"x.tsv:1: the names 'a,b' are not separated"),
        ("x.csv", b"a,b\n1,2\n\n1\n", r"x.csv:4: 1 values, but the first line names 2: a, b"),
        ("x.csv", b"a,a\n1,2\n", r"x.csv:1: the first line has the name 'a' twice"),
        ("x.csv", b"a,\n1,2\n", r"x.csv:1: the first line has a column without a name"),
        ("x.csv", b'a,b\n"1,2\n', r"x.csv:2: not a valid table: unexpected end of data"),
        ("x.csv", b"a,b\n\xff,2\n", r"x.csv: not UTF-8 after line 0, got byte 0xff"),
        ("x.csv", b"a,b\n", r"x.csv has no rows"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        list(read_rows(_write(tmp_path, name, content)))


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "csv", "parquet", "arrow"])
def test_pointers_of_git_lfs(tmp_path, ending):
    name = f"x.{ending}"
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        list(read_rows(str(tmp_path / name)))


def test_broken_containers(tmp_path):
    whole = gzip.compress(_lines(ROWS * 100))
    for content in (b"plain text", whole[: len(whole) // 2]):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="x.jsonl.gz cannot be read: .* Is the file complete"):
            list(read_rows(str(tmp_path / "x.jsonl.gz")))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="x.parquet cannot be read as Parquet"):
        list(read_rows(str(tmp_path / "x.parquet")))

    for content in (b"", b"plain text", b"ARROW1 not really"):
        (tmp_path / "x.arrow").write_bytes(content)
        with pytest.raises(UserError, match="x.arrow cannot be read as Arrow"):
            list(read_rows(str(tmp_path / "x.arrow")))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("key", ["data", "train", "any"])
def test_a_list_of_rows_in_an_object(tmp_path, key, indent):
    values = {"version": 1, "tags": ["x"], "none": [], key: ROWS}
    path = _write(tmp_path, "x.json", json.dumps(values, indent=indent).encode())
    rows = list(read_rows(path))
    assert [row.fields for row in rows] == ROWS and rows[1].where == f"{path} {key} row 2"


def test_the_messages_of_one_row_are_no_rows(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = _write(tmp_path, "x.json", json.dumps(row).encode())
    assert [each.fields for each in read_rows(path)] == [row]
    path = _write(tmp_path, "y.json", json.dumps(row, indent=1).encode())
    with pytest.raises(UserError, match="wrap it in"):
        list(read_rows(path))


def test_a_list_is_chosen_by_nobody(tmp_path):
    for indent in (None, 1):
        values = {"version": 1, "train": ROWS, "test": ROWS}
        path = _write(tmp_path, "x.json", json.dumps(values, indent=indent).encode())
        with pytest.raises(UserError, match="one JSON object; 'train', 'test' are lists of rows: "):
            list(read_rows(path))
    row = {"prompt": "a", "response": "b", "tools": [{"name": "t"}], "sources": [{"id": 1}]}
    path = _write(tmp_path, "x.json", json.dumps(row).encode())
    assert [each.fields for each in read_rows(path)] == [row]


@pytest.mark.parametrize(("name", "dialect"), [("x.csv", "excel"), ("x.TSV", "excel-tab")])
def test_tables(tmp_path, name, dialect):
    values = [{"prompt": 'a, "b"\r\n\tc', "response": ""}, {"prompt": "é", "response": "1.0"}]
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, ["prompt", "response"], dialect=dialect)
        writer.writeheader()
        writer.writerows(values)
    rows = list(read_file("t", tmp_path / name))
    assert [row.fields for row in rows] == values
    assert [row.where for row in rows] == ["t:2", "t:4"]


def test_a_long_value_of_a_table(tmp_path):
    path = _write(tmp_path, "x.csv", b"text\n" + b"word " * 100_000 + b"\n")
    assert [len(row.fields["text"]) for row in read_rows(path)] == [500_000]


TYPED = [
    {"text": "a", "more": {"x": [1, None]}, "tags": ["p", "q"]},
    {"text": None, "more": None, "tags": []},
]


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "file.feather", "x.parquet"])
def test_columns(tmp_path, name):
    """As pyarrow itself gives the rows, of several batches."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_pylist(TYPED * 5)
    open_writer = arrow.ipc.new_stream if name.startswith("stream") else arrow.ipc.new_file
    if name.endswith(".parquet"):
        parquet.write_table(table, tmp_path / name, row_group_size=3)
    else:
        with open_writer(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    rows = list(read_file("t", tmp_path / name))
    assert [row.fields for row in rows] == table.to_pylist() == TYPED * 5
    assert [row.where for row in rows] == [f"t row {number}" for number in range(1, 11)]


def test_bytes_that_are_text(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [{"prompt": "é".encode(), "image": b"\xff\xd8", "list": [{"deep": b"x"}]}]
    for kind in (arrow.binary(), arrow.large_binary()):
        deep = arrow.list_(arrow.struct([("deep", kind)]))
        schema = arrow.schema([("prompt", kind), ("image", kind), ("list", deep)])
        table = arrow.Table.from_pylist(values, schema)
        parquet.write_table(table, tmp_path / "x.parquet")
        (row,) = read_file("t", tmp_path / "x.parquet")
        assert row.fields == {"prompt": "é", "image": b"\xff\xd8", "list": [{"deep": "x"}]}


def test_messages_in_columns(tmp_path):
    """Some tables keep a list of messages as one list a key; options of a question stay so."""
    columns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    choices = {"text": ["x", "y"], "label": ["A", "B"]}
    path = _write(tmp_path, "x.jsonl", _lines([{"messages": columns, "choices": choices}]))
    (row,) = read_rows(path)
    assert row.fields["choices"] == choices
    assert row.fields["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    for odd in ({"role": ["user"], "content": []}, {"role": "user", "content": "a"}):
        path = pathlib.Path(_write(tmp_path, "y.jsonl", _lines([{"message": odd}])))
        assert next(read_file("t", path)).fields["message"] == odd
