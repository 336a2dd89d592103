"""The report shows what the logs hold, whatever state they are in, and runs nothing of theirs."""

import base64
import hashlib
import html.parser
import json
import pathlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora_jax import cli, inspect, report
from drlora_jax.config import TrainConfig, to_dict
from drlora_jax.errors import UserError
from drlora_jax.reporting import charts, maps, page, writer
from drlora_jax.reporting.read import read_run
from tests.support.run_logs import EVENTS, EXPERTS, LAYERS, R_INIT, R_TARGET, logged, write_run

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"


class Parsed(html.parser.HTMLParser):
    """Elements and texts of a page as a browser would see them."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.texts, self.scripts = [], [], []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, text):
        if self._inside == "script":
            self.scripts.append(text)
        else:
            self.texts.append(text)

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run").path


def render(*directories) -> Parsed:
    return Parsed(page.make_page([read_run(pathlib.Path(each)) for each in directories]))


def test_the_rank_map_is_the_log(run):
    data = render(run).data
    frames = data["maps"][0]["frames"]
    rows = logged(run / "ranks.jsonl")
    assert [step for step, _ in frames] == [0, *EVENTS] and data["maps"][0]["layers"] == [1, 2, 4]
    assert frames[0][1] == [[R_INIT] * EXPERTS] * len(LAYERS)
    assert [values for _, values in frames[1:]] == [row["ranks"] for row in rows]
    assert data["steps"] == [0, *EVENTS]


def test_the_rank_table_and_the_figures_are_the_log(run):
    text = page.make_page([read_run(run)])
    last = logged(run / "ranks.jsonl")[-1]
    table = text[text.index('<table class="ranks">') :].split("</table>")[0]
    cells = [row.split("</th>")[1] for row in table.split("<tr>")[2:]]
    found = [[int(cell.split("</td>")[0]) for cell in row.split("<td>")[1:]] for row in cells]
    assert found == last["ranks"]
    assert f"{np.mean(last['ranks']):.2f}" in Parsed(text).texts
    for layer in last["ranks"]:
        assert f"{sum(layer)} of {EXPERTS * R_TARGET}" in text


def test_layers_may_have_budgets_of_their_own(tmp_path):
    run = write_run(tmp_path / "run", budget=[30, 20, 13])
    ranks = logged(run.ranks_file)[-1]["ranks"]
    text = page.make_page([read_run(run.path)])
    lines = inspect.rank_lines(read_run(run.path))[-3:]
    for row, limit, line in zip(ranks, (30, 20, 13), lines, strict=True):
        assert f'<td class="sum">{sum(row)} of {limit}</td>' in text
        assert f"{sum(row)} of {limit}" in line
    assert "budget 4.2" in text


def test_saliency_is_shown_as_shares_of_its_layer(run):
    maps_by_unit = {each["unit"]: each for each in render(run).data["maps"]}
    for (step, shares_LE), row in zip(
        maps_by_unit["% of its layer"]["frames"], logged(run / "ranks.jsonl"), strict=True
    ):
        saliency_LE = np.array(row["saliency"])
        expected_LE = saliency_LE / saliency_LE.sum(axis=1, keepdims=True)
        assert step == row["step"]
        np.testing.assert_allclose(shares_LE, expected_LE, rtol=1e-3)
    assert [each[1] for each in maps_by_unit["% of choices"]["frames"]] == [
        row["routing_load"] for row in logged(run / "ranks.jsonl")
    ]


def test_curves_go_through_the_logged_points(run):
    plots = [json.loads(a["data-chart"]) for _, a in render(run).elements if "data-chart" in a]
    rows = logged(run / "metrics.jsonl")
    assert plots[0]["series"] == [["run", [[row["step"], row["loss"]] for row in rows]]]
    heldout = [[row["step"], row["eval_loss"]] for row in rows if "eval_loss" in row]
    assert plots[1]["series"] == [["run", heldout]]
    ranks = plots[2]["series"][0][1]
    means = [R_INIT, *(float(np.mean(row["ranks"])) for row in logged(run / "ranks.jsonl"))]
    assert ranks == [[step, mean] for step, mean in zip([0, *EVENTS], means, strict=True)] + [
        [40, means[-1]]
    ]
    memory = [plot["series"][0][1][-1][1] for plot in plots if plot["unit"] == "GiB"]
    assert memory == [rows[-1]["host_peak_bytes"] / 2**30]


def test_the_page_needs_nothing_from_elsewhere(run):
    parsed = render(run)
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for tag, a in parsed.elements if "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy
    style = (page.FOLDER / "page.css").read_text()
    assert "url(" not in style and "@import" not in style


HOSTILE = "\"'></script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;<!--"


def test_text_from_files_is_inert(tmp_path):
    directory = tmp_path / "a<script>alert(1)<'\"&b"
    run = write_run(directory)
    stored = json.loads(run.config_file.read_text())
    stored["config"]["model"]["path"] = HOSTILE
    stored["config"][HOSTILE] = {HOSTILE: [HOSTILE]}
    stored["versions"] = {HOSTILE: HOSTILE}
    stored["devices"] = {"kind": HOSTILE, "count": HOSTILE, "mesh": {HOSTILE: HOSTILE}}
    run.config_file.write_text(json.dumps(stored))
    row = {"task": HOSTILE, "metric": HOSTILE, "value": 0.5, "n": HOSTILE, "step": HOSTILE}
    (directory / "eval.json").write_text(json.dumps({"scores": [row]}))
    event = logged(run.ranks_file)[-1] | {"step": 35, "layers": [HOSTILE] * 3}
    event["groups"] = {HOSTILE: [[1, 2], [3, 4], [5, 6]]}
    run.log_metrics({"step": 41, "heldout": {HOSTILE: 2.0}})
    with run.ranks_file.open("a") as handle:
        handle.write(json.dumps(event) + "\n")
    for runs in ([directory], [directory, write_run(tmp_path / "plain").path]):
        parsed = render(*runs)
        assert [tag for tag, _ in parsed.elements].count("script") == 2
        assert "img" not in dict(parsed.elements)
        assert not any(name.startswith("on") for _, a in parsed.elements for name in a)
        assert any(HOSTILE in text for text in parsed.texts)
        assert parsed.data["maps"]


def test_a_run_killed_in_a_line_still_has_a_report(run):
    for file in ("metrics.jsonl", "ranks.jsonl"):
        text = (run / file).read_text()
        (run / file).write_text(text[: len(text) - 25])
    parsed = render(run)
    assert [step for step, _ in parsed.data["maps"][0]["frames"]] == [0, *EVENTS[:-1]]
    assert any("2 log lines could not be read" in text for text in parsed.texts)


def test_an_old_run_without_the_newer_fields_has_a_report(tmp_path):
    run = write_run(tmp_path / "old", made_with=False).path
    parsed = render(run)
    assert [step for step, _ in parsed.data["maps"][0]["frames"]] == list(EVENTS)
    assert not any("GiB" in text for text in parsed.texts)


@pytest.mark.parametrize(
    ("allocation", "highest"),
    [
        (dict(kind="uniform", r_target=3), 3),
        (dict(kind="adalora", r_init=6, r_target=3), 6),
        (dict(kind="prilora", r_init=2, r_target=8), 14),
        (dict(kind="random", r_max=40), 40),
        ({"kind": "of another version"}, 0),
    ],
)
def test_the_colours_of_an_old_run_reach_what_its_policy_allocates(run, allocation, highest):
    values = to_dict(TrainConfig())["allocation"] | allocation
    config = {f"allocation.{name}": value for name, value in values.items()}
    log = read_run(run)._replace(config=config, facts={}, events=[])
    assert maps.highest_rank(log) == highest


def test_a_run_without_logs_has_a_report(run):
    (run / "metrics.jsonl").unlink()
    (run / "ranks.jsonl").unlink()
    assert render(run).data["steps"] == [0]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["step", "ranks", "layers", "value", "x"]), inner)
    ),
    max_leaves=8,
)
names = ["loss", "eval_loss", "tokens", "mfu", "ranks", "saliency", "routing_load", "layers"]
names += ["budget", "groups", "heldout", "tokens_per_second", "host_peak_bytes"]
rows = st.dictionaries(st.sampled_from(names), values).map(lambda row: {"step": 3} | row)


@settings(max_examples=60, deadline=None)
@given(
    metrics=st.lists(rows, max_size=3), events=st.lists(rows, max_size=3), facts=rows, scores=values
)
def test_nothing_in_the_logs_breaks_a_report(tmp_path_factory, metrics, events, facts, scores):
    run = write_run(tmp_path_factory.mktemp("odd"))
    for file, more in ((run.metrics_file, metrics), (run.ranks_file, events)):
        with file.open("a") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in more)
    stored = json.loads(run.config_file.read_text()) | facts
    run.config_file.write_text(json.dumps(stored))
    (run.path / "eval.json").write_text(json.dumps(scores))
    assert render(run.path).data["maps"]


def test_evaluations_are_shown_in_whatever_form(run):
    row = {"task": "arc_easy", "metric": "accuracy", "value": 0.75, "stderr": 0.01, "n": 10}
    named = {"arc_easy": {key: row[key] for key in row if key != "task"}}
    for form in (row, [row], {"scores": [row]}, named):
        (run / "eval.json").write_text(json.dumps(form))
        texts = render(run).texts
        assert "arc_easy" in texts and "0.7500" in texts and "0.7304 to 0.7696" in texts
    row |= {"ci95": [0.7, 0.8], "step": None}
    (run / "eval.json").write_text(json.dumps({"scores": [row]}))
    texts = render(run).texts
    assert "0.7000 to 0.8000" in texts and "base" in texts


def test_config_differences_to_the_defaults(run):
    text = page.make_page([read_run(run)])
    changed = text.split("differs from the defaults")[1].split("<details>")[0]
    for line in ("allocation.r_max</code></th><td>32</td><td>8", "train.steps</code></th><td>100"):
        assert line in changed
    assert "train.learning_rate" not in changed and "run.dir" not in changed


def test_a_comparison_shows_what_differs(run, tmp_path):
    other = write_run(tmp_path / "other", seed=1, learning_rate=5e-4).path
    text = page.make_page([read_run(run), read_run(other)])
    changed = text.split("where the runs differ")[1].split("</section>")[0]
    assert "train.learning_rate</code></th><td>2e-05</td><td>0.0005" in changed
    assert "train.steps" not in changed and "run.dir" not in changed
    data = Parsed(text).data
    assert len(data["maps"]) == 2 and data["maps"][0]["high"] == data["maps"][1]["high"]
    for each, directory in zip(data["maps"], (run, other), strict=True):
        assert each["frames"][-1][1] == logged(directory / "ranks.jsonl")[-1]["ranks"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / folder / "run").path for folder in ("a", "b")]
    assert page.distinct_names([read_run(each) for each in runs]) == [str(each) for each in runs]


def test_the_command(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.main(["--run", str(run)]) == 0 and (run / "report.html").is_file()
    assert report.main(["--run", str(run), "--run", str(run), "--out", "x.html"]) == 0
    assert (tmp_path / "x.html").is_file() and "wrote x.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: None, "no such directory"),
        (lambda d: d.mkdir(), "is an empty directory, not a run"),
        (lambda d: d.write_text("x"), "is a file"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{")), "cannot be read"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text(POINTER)), "a git-lfs pointer"),
        (
            lambda d: (d.mkdir(), (d / "config.json").write_text("[]")),
            "is not a run: it has no config.json of",
        ),
        (lambda d: (d.mkdir(), (d / "config.json").write_text('{"config": 1}')), "is not a run: "),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, make, message, capsys):
    make(tmp_path / "foreign")
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: report.main(["--run", str(tmp_path / "foreign")]))
    errors = capsys.readouterr().err
    assert end.value.code == 2 and message in errors and "Traceback" not in errors
    with pytest.raises(UserError, match="--out"):
        report.main(["--run", str(write_run(tmp_path / "run").path), "--out", "no/such/x.html"])


# ---------------------------------------------------------------------------------------------
# parts


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
@settings(max_examples=30, deadline=None)
def test_a_thinned_curve_keeps_its_extremes_and_ends(values):
    points = list(enumerate(values))
    thinned = charts.thin(points, 100)
    assert set(thinned) <= set(points) and len(thinned) <= 102 and thinned == sorted(thinned)
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    assert max(y for _, y in thinned) == max(values) and min(y for _, y in thinned) == min(values)


def test_a_moving_mean_is_a_mean():
    draw = np.random.default_rng(0)
    values = draw.normal(size=50)
    for half in (0, 3, 60):
        expected = [values[max(i - half, 0) : i + half + 1].mean() for i in range(50)]
        found = [value for _, value in charts.moving_mean(list(enumerate(values)), half)]
        np.testing.assert_allclose(found, expected, atol=1e-12)


@given(st.floats(-1e3, 1e3), st.floats(1e-2, 1e6))
@settings(deadline=None)
def test_ticks_are_evenly_spaced_and_inside(low, span):
    ticks = charts.nice_ticks(low, low + span, 5)
    assert 2 <= len(ticks) <= 11
    assert low - 1e-6 * span <= ticks[0] and ticks[-1] <= low + span * (1 + 1e-6)
    assert np.ptp(np.diff(ticks)) <= 1e-6 * span
    assert len(set(charts.distinct_labels(ticks))) == len(ticks)


def test_large_histories_are_thinned_evenly():
    frames = [maps.Frame(step, [[step]]) for step in range(100)]
    kept = maps.thin_frames(frames, 12)
    assert kept[0] == frames[0] and kept[-1] == frames[-1] and len(kept) == 12
    assert set(np.diff([each.step for each in kept])) == {9}
    assert maps.thin_frames(frames, 100) == frames


# ---------------------------------------------------------------------------------------------
# while training


def test_the_last_request_is_always_written(tmp_path, monkeypatch):
    """However many come while it writes; the loop does not wait for any of them."""
    state, written, is_free = [0], [], threading.Event()

    def slow(directories, out):
        seen = state[0]
        is_free.wait(5)
        written.append(seen)

    monkeypatch.setattr(writer, "write_report", slow)
    with writer.ReportWriter(tmp_path) as report_writer:
        for step in range(1, 6):
            state[0] = step
            report_writer.request()
        is_free.set()
    assert written[-1] == 5 and len(written) <= 3


def test_a_report_that_can_not_be_written_ends_nothing(tmp_path, capsys):
    with writer.ReportWriter(tmp_path / "missing") as report_writer:
        report_writer.request()
    assert capsys.readouterr().err.count("the report could not be written") == 1


def test_a_log_that_is_a_pointer_of_git_lfs_is_named(tmp_path):
    run = write_run(tmp_path / "run").path
    (run / "metrics.jsonl").write_text(POINTER)
    with pytest.raises(UserError, match=r"metrics\.jsonl is a git-lfs pointer"):
        read_run(run)
