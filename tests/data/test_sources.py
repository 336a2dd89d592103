"""Which rows a path means: files, folders, globs, saved data sets, names of the hub."""

import itertools
import json
import sys
import types

import pytest

from drlora_jax.config import DataSection
from drlora_jax.data import sources
from drlora_jax.data.documents import check_paths
from drlora_jax.data.sources import find_sources, read_paths, read_rows
from drlora_jax.errors import UserError

ROWS = [{"prompt": "a\u2028b", "response": "é"}, {"prompt": "c", "response": "d"}]


def _lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _write(folder, name: str, content: bytes) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return str(file)


def test_several_files_in_order(tmp_path):
    paths = [_write(tmp_path, f"{i}.jsonl", _lines([{"i": i}])) for i in (2, 0, 1)]
    assert [row.fields["i"] for row in read_rows(paths)] == [2, 0, 1]


def test_bundled(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    _write(tmp_path / "set", "train.jsonl", _lines(ROWS))
    _shards(tmp_path, "set/config.json", "set/tokenizer.json")
    monkeypatch.setattr(sources, "BUNDLED", tmp_path)
    rows = list(read_rows("bundled:set/train.jsonl"))
    assert rows[0].where == "bundled:set/train.jsonl:1"
    for name in ("bundled:set/nope.jsonl", "bundled:../x.jsonl"):
        with pytest.raises(UserError, match="no such file; it has bundled:set/train.jsonl\\.$"):
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
    with pytest.raises(UserError, match="does not load as .*: ConnectionError: gone"):
        list(read_rows("owner/name"))


def test_datasets_name_without_network(monkeypatch):
    def fail(name, split):
        raise ConnectionError("no route\nlong trace")

    _fake_datasets(monkeypatch, fail)
    with pytest.raises(
        UserError, match="does not load as .*: ConnectionError: no route. Give a local"
    ):
        list(read_rows("owner/name"))


def test_package_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(read_rows("owner/name"))


def test_missing_files(tmp_path):
    _write(tmp_path, "train.jsonl", _lines(ROWS))
    with pytest.raises(UserError, match="trian.jsonl: no such file; did you mean .*/train.jsonl?"):
        list(read_rows(str(tmp_path / "trian.jsonl")))
    with pytest.raises(UserError, match="zzz.json: no such file; the folder .* has train.jsonl"):
        list(read_rows(str(tmp_path / "zzz.json")))
    with pytest.raises(UserError, match="its folder .*gone does not exist either"):
        list(read_rows(str(tmp_path / "gone" / "train.jsonl")))


# ----------------------------------------------------------------------------------- several files


def _shards(folder, *names: str) -> None:
    """Files of one row each, which says its file."""
    for name in names:
        _write(folder, name, _lines([{"file": name}]))


def _files(path, split="train") -> list[str]:
    return [row.fields["file"] for row in read_rows(str(path), split=split)]


def test_paths_are_told_apart(tmp_path):
    _write(tmp_path, "a.jsonl", _lines(ROWS))
    _shards(tmp_path, "d/2.jsonl", "d/1.jsonl")
    _write(tmp_path, "d/0.jsonl", b"")
    paths = [str(tmp_path / "a.jsonl"), f"{tmp_path}/d/"]
    found = {name: [row.fields for row in rows] for name, rows in read_paths(paths)}
    assert list(found) == [paths[0], f"{tmp_path}/d/1.jsonl", f"{tmp_path}/d/2.jsonl"]
    assert found[paths[0]] == ROWS and found[f"{tmp_path}/d/1.jsonl"] == [{"file": "d/1.jsonl"}]
    with pytest.raises(UserError, match="absent.jsonl: no such file"):
        next(read_paths([paths[0], str(tmp_path / "absent.jsonl")]))  # before any is read


def test_a_row_is_not_read_before_it_is_asked_for(tmp_path):
    path = _write(tmp_path, "x.jsonl", _lines(ROWS) + b"broken")
    assert len(list(itertools.islice(read_rows(path), 2))) == 2


def test_a_folder_of_shards(tmp_path):
    data = ("b/2.jsonl", "b/1.jsonl", "a.jsonl", "b/c/d.JSONL")
    others = (".hidden.jsonl", ".cache/x.jsonl", "__pycache__/x.jsonl", "b/dataset_info.json")
    _shards(tmp_path, *data, *others, "dataset_infos.json", "README.md", "_SUCCESS")
    assert _files(tmp_path) == ["a.jsonl", "b/1.jsonl", "b/2.jsonl", "b/c/d.JSONL"]


SPLITS = [
    ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"),
    ("train/0.jsonl", "train/1.jsonl"),
    ("my-train-0.jsonl", "my-train-1.jsonl"),
    ("training_a.jsonl", "training_b.jsonl"),
]


@pytest.mark.parametrize("train", SPLITS)
def test_splits_are_those_of_datasets(tmp_path, monkeypatch, train):
    """As `datasets` reads the folder itself."""
    datasets = pytest.importorskip("datasets")
    rest = {"test": "test", "validation": "dev"}
    if "data/" in train[0]:
        rest = {"test": "test", "validation": "validation"}
    names = {split: train[0].replace("training", word) for split, word in rest.items()}
    names = {split: name.replace("train", rest[split]) for split, name in names.items()}
    _shards(tmp_path / "d", *train, *names.values())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert set(found) == {"train", "test", "validation"}
    for split, rows in found.items():
        assert _files(tmp_path / "d", split) == rows["file"]
    assert _files(tmp_path / "d", "train") == list(train)


def test_splits_by_names_of_their_own(tmp_path):
    names = [f"data/{split}-00000-of-00001.jsonl" for split in ("train_sft", "test_sft", "en")]
    _shards(tmp_path, *names)
    assert _files(tmp_path, "train_sft") == names[:1] and _files(tmp_path, "en") == names[2:]
    with pytest.raises(UserError, match="no file of the split train, only of en, test_sft, train_"):
        _files(tmp_path)
    _shards(tmp_path / "one", "part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl")
    assert len(_files(tmp_path / "one", "validation")) == 2  # names that say no split


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train.jsonl", "other.jsonl"],
            "of the split train and files whose .* such as other.jsonl",
        ),
        (["train.jsonl", "test.jsonl"], "no file of the split validation, only of test, train"),
        (["a.jsonl", "a.csv"], r"several kinds \(.csv, .jsonl\), which may hold the same rows"),
        (["README.md", "x.zip"], r"directory without data files. It has README.md, x.zip. Known"),
        (["config.json"], "It looks like a model directory or a run"),
        ([], "directory without data files. It is empty. Known file types are .jsonl"),
    ],
)
def test_folders_that_say_too_little(tmp_path, names, message):
    (tmp_path / "d").mkdir()
    _shards(tmp_path / "d", *names)
    with pytest.raises(UserError, match=message):
        _files(tmp_path / "d", "validation")


def test_only_the_field_that_chooses_a_split_is_named(tmp_path):
    _shards(tmp_path / "d", "train.jsonl", "test.jsonl")
    way = "only of test, train; name the file, such as .*/d/test.jsonl"
    with pytest.raises(UserError, match=way):
        find_sources(str(tmp_path / "d"), split="validation")
    config = DataSection(path=(str(tmp_path / "d"),), eval_path=(str(tmp_path / "d"),))
    way = "only of test, train; set data.eval_split=test, or name the file"
    with pytest.raises(UserError, match=way):
        check_paths(config)


def test_a_folder_of_several_data_sets(tmp_path):
    _shards(tmp_path, "main/train.jsonl", "socratic/train.jsonl")
    card = "---\nconfigs:\n- config_name: main\n  data_files: x\n- config_name: 'socratic'\n---\n"
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(
        UserError, match=r"data sets \(main, socratic\).*one of them, such as .*/main"
    ):
        _files(tmp_path)
    assert _files(tmp_path / "main") == ["main/train.jsonl"]


def test_an_empty_folder_hides_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    with pytest.raises(UserError, match="It is empty. It hides the `datasets` name of the hub"):
        find_sources("openai/gsm8k")


def test_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _shards(tmp_path, "d/b.jsonl", "d/a.jsonl", "d/deep/c.jsonl", "d/dataset_info.json")
    assert _files("d/*.jsonl") == _files("d/[ab].jsonl") == _files("d/?.jsonl")
    assert _files("d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert _files(tmp_path / "d" / "**" / "*.jsonl") == _files("d/*") == _files("d")
    assert len(_files("d")) == 3
    _shards(tmp_path, "d/[ab].jsonl")
    assert _files("d/[ab].jsonl") == ["d/[ab].jsonl"]  # a file of that very name
    (tmp_path / "d" / "notes.txt").write_text("")
    with pytest.raises(
        UserError, match=r"d/\* also matches d/notes.txt, .* narrow the glob, .*\*.jsonl"
    ):
        find_sources("d/*")
    with pytest.raises(
        UserError, match=r"e\*/x.jsonl matches no data file; known types are .jsonl"
    ):
        find_sources("e*/x.jsonl")


@pytest.mark.parametrize("shards", [1, 3])
def test_saved_data_sets(tmp_path, shards):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p{i}", "response": "r", "tags": [str(i)]} for i in range(10)]
    made = datasets.Dataset.from_list(rows).filter(lambda row: row["prompt"] != "p3")
    made.save_to_disk(tmp_path / "one", num_shards=shards)
    expected = datasets.load_from_disk(tmp_path / "one").to_list()
    path = str(tmp_path / "one")
    ((name, found),) = read_paths(path, split="any")
    found = list(found)
    assert name == path and [row.fields for row in found] == expected and len(expected) == 9
    assert [row.where for row in found] == [f"{path} row {n}" for n in range(1, 10)]
    datasets.DatasetDict(train=made, test=made.select([4])).save_to_disk(tmp_path / "both")
    assert [row.fields for row in read_rows(f"{tmp_path}/both", split="test")] == expected[4:5]
    with pytest.raises(UserError, match="no split validation, only train, test; give .*/test"):
        find_sources(str(tmp_path / "both"), split="validation")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="which state.json lists, is absent"):
        list(read_rows(path))


# --------------------------------------------------------------------------------------- addresses


def test_an_address_of_a_file_is_a_path(tmp_path):
    path = _write(tmp_path, "a b.jsonl", _lines(ROWS))
    url = (tmp_path / "a b.jsonl").as_uri()
    assert "%20" in url
    assert [row.fields for row in read_rows(url)] == [row.fields for row in read_rows(path)]


@pytest.mark.parametrize("url", ["https://h/x.jsonl", "s3://b/*.jsonl", "hf://datasets/a/b"])
def test_other_addresses_keep_their_slashes(url):
    with pytest.raises(UserError) as caught:
        find_sources(url)
    assert str(caught.value).startswith(f"{url} is a URL")


def test_names_with_a_comma(tmp_path):
    _write(tmp_path, "a, b.jsonl", _lines(ROWS))
    assert len(list(read_rows((str(tmp_path / "a, b.jsonl"),)))) == 2
