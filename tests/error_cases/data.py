"""Data: paths, files that are not what their name says, and rows that can not be used."""

import gzip
import importlib.util
import json
import os
import pathlib

from tests.error_cases.case import HACKED, PAGE, POINTER, Case

GOOD = {"prompt": "a", "response": "b"}
TULU = "data.template=tulu"
ALPACA = {"instruction": "a", "output": "b"}
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
IMAGE = USER | {"content": [{"type": "image", "image": "a.png"}]}
THOUGHT = ANSWER | {"reasoning_content": "because"}
CALL = ANSWER | {"tool_calls": [{"name": "f", "arguments": {}}]}


def _path(path: str, message: str, what: str, make=None) -> Case:
    return Case("data.path", what, message, (f"data.path={path}",), make)


def _file(what: str, message: str, content: bytes, name="rows.jsonl", **options) -> Case:
    def make(folder: pathlib.Path) -> None:
        (folder / name).write_bytes(content)

    return Case("data file", what, message, (f"data.path={name}",), make, **options)


def _row(what: str, message: str, row: dict, *overrides: str, first=GOOD) -> Case:
    """A good first row, so that the format is found, and the bad one as the second."""

    def make(folder: pathlib.Path) -> None:
        lines = [json.dumps(each) for each in (first, row) if each is not None]
        (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))

    return Case("data row", what, message, overrides, make)


def _chat(what: str, message: str, messages, *overrides: str) -> Case:
    good = {"messages": [USER, ANSWER]}
    return _row(what, f"rows.jsonl:2: .*{message}", {"messages": messages}, *overrides, first=good)


def _roles(*roles: str) -> list[dict]:
    return [{"role": role, "content": "a"} for role in roles]


def _parquet(folder: pathlib.Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a"] * 50, "response": ["b"] * 50})
    pyarrow.parquet.write_table(table, folder / "x.parquet", compression="none")


def _broken_parquet(change):
    def make(folder: pathlib.Path) -> None:
        _parquet(folder)
        content = (folder / "x.parquet").read_bytes()
        (folder / "x.parquet").write_bytes(change(content))

    return make


def _parquet_case(what: str, change) -> Case:
    message = "x.parquet cannot be read as Parquet"
    return Case(
        "data file",
        what,
        message,
        ("data.path=x.parquet",),
        _broken_parquet(change),
        varies="(?<=as Parquet: ).*",
    )


def _python_set(folder: pathlib.Path) -> None:
    """A loading script, as data sets once had."""
    (folder / "evil").mkdir()
    (folder / "evil" / "evil.py").write_text(f"open({HACKED!r}, 'w')\n")


def _shards(*names: str):
    def make(folder: pathlib.Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(_LINE)

    return make


_MIXED = ("d/train.jsonl", "d/stray.jsonl")
_LINE = json.dumps(GOOD).encode() + b"\n"
_WHOLE = gzip.compress(_LINE * 500, mtime=0)
PATHS = (
    _path("nowhere.jsonl", "no such file; did you mean rows.jsonl", "not there"),
    _path(
        "other.parquet",
        "no such file; the folder . has rows.jsonl",
        "not there, and nothing like it",
    ),
    _path("gone/rows.jsonl", "its folder gone does not exist", "no such folder"),
    _path("model", "without data files. It looks like a model directory", "a model directory"),
    _path("evil", "a directory without", "a directory with a loading script", _python_set),
    _path("owner/set", "hides the", "an empty folder of a hub name", _shards("owner/set/.x")),
    _path(
        "d",
        "of the split train and files whose names say no split",
        "a folder with a stray file",
        _shards(*_MIXED),
    ),
    _path("d", "no file of the split train, only", "no such split", _shards("d/test.jsonl")),
    _path("d", "several kinds", "a folder of two kinds", _shards("d/a.jsonl", "d/a.csv")),
    _path("d/*", "also matches d/b.log", "a glob too wide", _shards("d/a.jsonl", "d/b.log")),
    _path("d*.jsonl", "matches no data file", "a glob that matches nothing"),
    _path("https://h/x.jsonl", "https://h/x.jsonl is a URL, but only", "a web address"),
    _path("gs://b/x.jsonl", "data.path=gs://b/x.jsonl is a URL, but buckets", "a bucket"),
    _path("notes.txt", "does not tell where rows begin", "plain text", _shards("notes.txt")),
    _path("rows.zip", "unknown file type", "a file of another kind", _shards("rows.zip")),
    _path(
        "pipe.jsonl", "it is a named pipe", "a named pipe", lambda d: os.mkfifo(d / "pipe.jsonl")
    ),
    _path(
        "loop.jsonl",
        "out of reach",
        "a link to itself",
        lambda d: (d / "loop.jsonl").symlink_to("loop.jsonl"),
    ),
    _path(
        "gone.jsonl",
        "a link to nothing",
        "a link to nothing",
        lambda d: (d / "gone.jsonl").symlink_to("absent"),
    ),
    _path(
        "zero.jsonl",
        "it is a device",
        "an endless device",
        lambda d: (d / "zero.jsonl").symlink_to("/dev/zero"),
    ),
    _path("x" * 300 + ".jsonl", "name too long", "a name too long for a file"),
    _path("a\0.jsonl", "not allowed in UTF-8 text or paths", "a NUL in the name"),
    _path("\udcff.jsonl", "data.path is not UTF-8 at character 11", "a name that is not UTF-8"),
    _path("bundled:gsm8k/nope.jsonl", "no such file; it has", "an unknown bundled file"),
    _path("bundled:../config.py", "the package has no such file", "a path behind bundled:"),
    _path("owner/name:", "write NAME, or NAME:CONFIG", "an empty configuration of a data set"),
)
FILES = (
    _file("an empty file", "rows.jsonl has no rows", b""),
    _file("blank lines only", "rows.jsonl has no rows", b"\n \n\n"),
    _file("an empty list", "x.json has no rows", b"[]", "x.json"),
    _file("a pointer of git-lfs", "rows.jsonl is a git-lfs pointer", POINTER),
    _file("a web page", "rows.jsonl is a web page .HTML., not the file itself: download", PAGE),
    _file(
        "one object over several lines",
        "x.json is one JSON object over several lines, with .*; wrap it in",
        json.dumps(GOOD, indent=1).encode(),
        "x.json",
    ),
    _file(
        "a list by the name of JSON lines",
        "rows.jsonl:1: each line must be an object, got a list",
        json.dumps([GOOD]).encode(),
    ),
    _file(
        "a list over several lines by that name",
        "rows.jsonl:1: only '.', so the file is one JSON value over several",
        json.dumps([GOOD], indent=1).encode(),
    ),
    _file("semicolons in a table", "x.csv:1: .*not separated", b"prompt;response\na;b\n", "x.csv"),
    _file("a short line of a table", "x.csv:2: 1 values", b"prompt,response\na\n", "x.csv"),
    _file(
        "a byte that is not UTF-8",
        "rows.jsonl:2: not UTF-8, got byte 0xff",
        _LINE + b'{"prompt": "\xff"}\n',
    ),
    _file("UTF-16", "rows.jsonl:1: not UTF-8, got byte 0xff", _LINE.decode().encode("utf-16")),
    _file(
        "a line that is no JSON",
        r"rows.jsonl:2: not JSON at column 9",
        _LINE + b'{"prompt\n'[:-1] + b"\n",
        varies=r"(?<=column )\d+ .*?(?=; )",
    ),
    _file(
        "a NUL byte",
        "rows.jsonl:2: not JSON",
        _LINE + b'{"prompt": "a\0"}\n',
        varies=r"(?<=column )\d+ .*?(?=; )",
    ),
    _file(
        "a comma behind the last field",
        "rows.jsonl:1: not JSON",
        b'{"prompt": "a",}\n',
        varies=r"(?<=column )\d+ .*?(?=; )",
    ),
    _file("CSV by the name of JSON lines", "rows.jsonl:1: not JSON", b"prompt,response\na,b\n"),
    _file(
        "nested without end",
        "rows.jsonl:1: this JSON cannot be read",
        b"[" * 100_000,
        varies="(?<=can be read: ).*",
    ),
    _file(
        "a number of 5000 digits",
        "rows.jsonl:1: this JSON cannot be read",
        b'{"a": ' + b"9" * 5000 + b"}",
        varies="(?<=can be read: ).*",
    ),
    _file(
        "a line that is a list", "rows.jsonl:2: a row must be an object, got list", _LINE + b"[1]\n"
    ),
    _file(
        "a list with a number in it",
        "x.json row 2: a row must be an object, got int",
        b'[{"prompt": "a", "response": "b"}, 3]',
        "x.json",
    ),
    _file(
        "a list that is cut off",
        "x.json:1: not JSON",
        b'[{"prompt": "a"}, ',
        "x.json",
        varies=r"(?<=column )\d+ .*?(?=; )",
    ),
    _file("no gzip", "cannot be read: .*Is the file complete", b"plain text", "x.jsonl.gz"),
    _file(
        "a gzip that is cut off",
        "cannot be read: .*Is the file complete",
        _WHOLE[: len(_WHOLE) // 2],
        "x.jsonl.gz",
    ),
    _file(
        "a gzip with another checksum",
        "cannot be read",
        _WHOLE[:-8] + b"\0" * 8,
        "x.jsonl.gz",
        varies=r"(?<=read: ).*?(?=\. Is)",
    ),
    _file(
        "a line of 65 MiB out of a small gzip",
        "x.jsonl.gz:2: the row has more than 64 MiB",
        gzip.compress(_LINE + b'{"prompt": "' + b"a" * (65 << 20) + b'"}\n', 1, mtime=0),
        "x.jsonl.gz",
    ),
    *(
        (
            _parquet_case("text by the name of Parquet", lambda content: b"plain text"),
            _parquet_case(
                "a Parquet file that is cut off", lambda content: content[: len(content) // 2]
            ),
            _parquet_case(
                "a Parquet file with damaged pages", lambda x: x[:4] + b"\xff" * 60 + x[64:]
            ),
        )
        if importlib.util.find_spec("pyarrow")
        else ()
    ),
)
ROWS = (
    _row(
        "no field that is known",
        "cannot detect the format of a row with the fields a, b",
        {"a": 1, "b": 2},
        first=None,
    ),
    _row("an object without fields", "cannot detect the format", {}, first=None),
    _row("a missing field", "rows.jsonl:2: field 'response' is missing", {"prompt": "a"}),
    _row("null", "rows.jsonl:2: field 'response' is null", GOOD | {"response": None}),
    _row("an empty answer", "rows.jsonl:2: field 'response' is empty", GOOD | {"response": ""}),
    _row(
        "an answer of blanks", "rows.jsonl:2: field 'response' is empty", GOOD | {"response": " \n"}
    ),
    _row("a number", "field 'response' must be a string, got int", GOOD | {"response": 3}),
    _row("a list", "field 'prompt' must be a string, got list", GOOD | {"prompt": ["a"]}),
    _row("half of a surrogate pair", "half of a surrogate pair", GOOD | {"response": "\ud800"}),
    _row(
        "a field that is not there by the config",
        "cannot detect the format",
        GOOD,
        "data.prompt_field=question",
    ),
    _row(
        "a format that the rows do not have",
        "field 'instruction' is missing",
        GOOD,
        "data.format=alpaca",
    ),
    _row(
        "an Alpaca row without output",
        "field 'output' is missing",
        {"instruction": "a"},
        first={"instruction": "a", "output": "b"},
    ),
    _row("empty text", "field 'text' is empty", {"text": ""}, first={"text": "a b"}),
    _row(
        "too long, where that stops",
        r"rows.jsonl:2: \d+ tokens, but train.sequence_length is 64",
        GOOD | {"response": "one two " * 99},
        "data.too_long=stop",
    ),
    _row(
        "a prompt that fills the row",
        "no target token left in the first 64",
        {"prompt": "one two " * 99, "response": "b"},
    ),
    _row(
        "nothing but bad rows, where they are skipped",
        "no row is left of 1: 1 empty response",
        GOOD | {"response": ""},
        "data.bad_rows=skip",
        first=None,
    ),
    _row(
        "a prompt template for chats",
        "writes one prompt and one response",
        {"messages": [USER, ANSWER]},
        "data.template=alpaca",
        first=None,
    ),
    _row(
        "a template for plain text",
        "does not apply to data.format=text",
        {"text": "a b"},
        "data.template=tulu",
        first=None,
    ),
    _row(
        "no question of the task",
        "rows.jsonl:2: not a row of boolq",
        {"question": "is it"},
        "data.format=choice",
        "data.path=boolq=rows.jsonl",
        first={"question": "is it", "answer": True},
    ),
    _chat("messages that are text", "field 'messages' must be a list of messages, got str", "a"),
    _chat("no messages", "field 'messages' is an empty list", []),
    _chat("a message that is text", "message 1 must be an object, got str", ["a"]),
    _chat("a message without a role", "message 1 needs a 'role'", [{"content": "a"}, ANSWER]),
    _chat(
        "a message without content", "message 2 needs a 'content'", [USER, {"role": "assistant"}]
    ),
    _chat(
        "content that is a list",
        "the content of message 1 must be a string",
        [USER | {"content": [1]}, ANSWER],
    ),
    _chat(
        "an empty answer in a chat",
        r"message 2 \(assistant\) is empty",
        [USER, ANSWER | {"content": " "}],
    ),
    _chat(
        "a message of other keys",
        "message 1 needs a 'role', got the fields speaker",
        [{"speaker": "a"}],
    ),
    _chat("an image", "content of message 1 has a part of type 'image'", [IMAGE, ANSWER]),
    _chat("an answer first", "message 1 is an answer without a turn before it", [ANSWER, USER]),
    _chat("no answer", "no assistant turn would be learned, got the roles user", _roles("user")),
    _chat(
        "no answer that is learned",
        "no assistant turn would be learned",
        [USER, ANSWER | {"weight": 0}],
    ),
    _chat(
        "half a weight",
        "the weight of message 2 must be .* got 0.5",
        [USER, ANSWER | {"weight": 0.5}],
    ),
    _chat(
        "an unknown role", "has the role 'narrator'", [USER | {"role": "narrator"}, ANSWER], TULU
    ),
    _chat("reasoning", "data.template=tulu writes no reasoning_content", [USER, THOUGHT], TULU),
    _chat("tool calls", "data.template=tulu writes no tool_calls", [USER, CALL], TULU),
    _chat(
        "tool calls whose arguments are no JSON",
        "the arguments of tool call 1 of message 2 must be a JSON object",
        [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "x=1"}]}],
    ),
    _row(
        "tools",
        "data.template=plain writes no tools",
        GOOD | {"tools": [{"name": "f"}]},
    ),
    _row("tools that are names", "field 'tools' must be a list of tools", GOOD | {"tools": ["f"]}),
    _row(
        "earlier turns of an Alpaca row",
        "data.template=alpaca writes one prompt and one response",
        ALPACA | {"history": [["a", "b"]]},
        first=ALPACA,
    ),
    _row(
        "earlier turns that are no pairs",
        r"field 'history' must be a list of \[user, assistant\]",
        ALPACA | {"history": [["a"]]},
        first=ALPACA,
    ),
)
CASES = (*PATHS, *FILES, *ROWS)
