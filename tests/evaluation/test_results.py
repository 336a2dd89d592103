"""eval.json, files of samples, the table, and comparisons of two files."""

import dataclasses
import json

import pytest

from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.evaluation import compare, results
from drlora_jax.evaluation.records import Sample, Score

COMMON = {"task": "arc_easy", "step": 5, "data_fingerprint": "d", "base_fingerprint": "b"}


def samples(values, prompt="p"):
    return [
        Sample(str(number), {"acc": float(value)}, {"prompt": prompt, "gold": 0})
        for number, value in enumerate(values)
    ]


def test_a_score_is_replaced_by_its_like_only(tmp_path):
    first = [Score(metric="acc", value=0.5, n=2, **COMMON)]
    others = [
        Score(metric="acc_norm", value=0.5, n=2, **COMMON),
        Score(metric="acc", value=0.6, n=2, **(COMMON | {"step": 10})),
        Score(metric="acc", value=0.7, n=2, **(COMMON | {"step": None})),
        Score(metric="acc", value=0.8, n=2, settings={"limit": 2}, **COMMON),
        Score(metric="acc", value=0.9, n=2, seed=1, **COMMON),
        Score(metric="acc", value=0.4, n=2, **(COMMON | {"data_fingerprint": "e"})),
    ]
    results.write_scores(tmp_path, first + others)
    results.write_scores(tmp_path, [Score(metric="acc", value=1.0, n=3, **COMMON)])
    rows = json.loads((tmp_path / "eval.json").read_text())["scores"]
    assert [row["value"] for row in rows] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.4, 1.0]
    assert rows[-1]["n"] == 3


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    (tmp_path / "eval.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="move it away"):
        results.check_writable(tmp_path)
    assert (tmp_path / "eval.json").read_text() == "[1, 2]"


def test_a_loss_is_followed_by_its_perplexity():
    found = [
        Sample("1", {"loss": 1.0}, {}, weight=3.0),
        Sample("2", {"loss": 2.0}, {}, weight=1.0),
    ]
    loss, perplexity = results.scores_of(found, ("loss",), {"task": "loss"})
    assert (loss.metric, loss.value, loss.n) == ("loss", 1.25, 2)
    assert perplexity.metric == "perplexity"
    assert perplexity.value == pytest.approx(3.4903429574618414)


@pytest.mark.parametrize(
    ("value", "interval", "said"),
    [
        (
            0.5,
            (0.19, 0.81),
            "arc_easy acc: 0.5000 cannot be distinguished from chance (0.2500, inside its",
        ),
        (0.05, (0.01, 0.2), "arc_easy acc: 0.0500 is below chance (0.2500, above its interval)"),
        (0.5, (0.26, 0.74), None),
        (0.5, None, None),
    ],
)
def test_accuracies_that_are_not_above_chance_are_marked(value, interval, said):
    score = Score("arc_easy", "acc", value, 40, ci95=interval)
    assert results.chance_lines([score]) == []  # of a task without answers to guess among
    lines = results.chance_lines([dataclasses.replace(score, chance=0.25)])
    assert lines == [] if said is None else lines[0].startswith(said)


def test_table_is_aligned():
    scores = [
        Score("gsm8k", "exact_match_strict", 0.5, 10, 0.1, (0.3, 0.7), step=200),
        Score("boolq", "acc", 1.0, 1),
    ]
    lines = results.table(scores).splitlines()
    assert (
        lines[1].split() == "gsm8k exact_match_strict 0.5000 0.1000 0.3000 to 0.7000 10 200".split()
    )
    assert lines[2].split() == "boolq acc 1.0000 1 base".split()
    assert len({line.index("e") for line in lines if line.startswith("task")}) == 1
    assert lines[0].index("value") + 5 == lines[1].index("0.5000") + 6


@pytest.mark.parametrize(
    ("value", "cells"),
    [
        (2267.2161, "2,267 21 2,227 to 2,308"),
        (104.52, "104.5 20.7 2,227.1 to 2,308.1"),
        (3.49034, "3.490 20.670 2,227.064 to 2,308.092"),
        (float("inf"), "inf 20.6697 2,227.0641 to 2,308.0920"),
    ],
)
def test_a_perplexity_has_four_figures(value, cells):
    score = Score("loss", "perplexity", value, 8, 20.6697, (2227.0641, 2308.0920), step=12)
    assert results.table([score]).splitlines()[1].split()[2:-2] == cells.split()


def test_names_of_sample_files():
    assert results.samples_name("arc_easy:mixlora", 12, {}) == "eval/arc_easy-mixlora-step12.jsonl"
    settings = {"shots": 8, "limit": 50, "chat": False, "dtype": "float32"}
    assert results.samples_name("gsm8k", None, settings) == (
        "eval/gsm8k-shots8-limit50-nochat-base.jsonl"
    )
    assert "/" not in results.samples_name("loss-../../x", None, {}).removeprefix("eval/")


def write(tmp_path, name, values, prompt="p"):
    results.write_samples(tmp_path, name, samples(values, prompt))
    return str(tmp_path / name)


def test_two_files_are_compared(tmp_path, capsys):
    first = write(tmp_path, "a.jsonl", [0] * 12 + [1] * 8)
    second = write(tmp_path, "b.jsonl", [1] * 20)
    assert compare.main([first, second]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "acc: second - first = +0.6000 (n 20" in text and text.endswith(": a difference\n")
    third = write(tmp_path, "c.jsonl", [0] * 11 + [1] * 9)
    assert "within noise" in compare.compare_files(first, third)


def test_other_prompts_or_files_are_not_compared(tmp_path):
    first = write(tmp_path, "a.jsonl", [0, 1])
    with pytest.raises(UserError, match="2 items have different prompts"):
        compare.compare_files(first, write(tmp_path, "b.jsonl", [0, 1], prompt="q"))
    with pytest.raises(UserError, match="different items"):
        compare.compare_files(first, write(tmp_path, "c.jsonl", [0, 1, 1]))
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="is not a file of samples"):
        compare.compare_files(first, str(tmp_path / "d.jsonl"))
    with pytest.raises(UserError, match="is not a file of samples"):
        compare.compare_files(first, str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match=r"^gs://b/a\.jsonl is a URL"):
        compare.compare_files(first, "gs://b/a.jsonl")
