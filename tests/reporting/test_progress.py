"""What a run shows: the map of ranks as text, progress on a terminal and elsewhere, memory."""

import io
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from drlora_jax.reporting.palette import shade
from drlora_jax.reporting.progress import Progress, peak_memory
from drlora_jax.reporting.terminal import MAX_COLUMNS, MAX_ROWS, RAMP, group_means, heat_map

SHAPES = [(1, 1), (4, 8), (16, 64), (27, 66), (48, 128), (61, 256), (94, 160)]


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_are_means_of_neighbours(shape):
    values_LE = np.random.default_rng(0).integers(0, 33, shape)
    grid = group_means(values_LE, MAX_ROWS, MAX_COLUMNS)
    rows, columns = grid.mean_LE.shape
    assert rows <= MAX_ROWS and columns <= MAX_COLUMNS
    assert (rows - 1) * grid.layers < shape[0] <= rows * grid.layers
    assert (columns - 1) * grid.experts < shape[1] <= columns * grid.experts
    for row in range(rows):
        for column in range(columns):
            part = values_LE[row * grid.layers :][: grid.layers]
            part = part[:, column * grid.experts :][:, : grid.experts]
            np.testing.assert_allclose(grid.mean_LE[row, column], part.mean())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("has_colour", [True, False])
def test_a_map_fits_its_terminal(shape, width, has_colour):
    ranks_LE = np.random.default_rng(0).integers(0, 33, shape)
    text = heat_map(ranks_LE, 32, tuple(range(shape[0])), width=width, has_colour=has_colour)
    lines = text.plain.splitlines()
    assert len(lines) <= MAX_ROWS + 1
    assert max(len(line) for line in lines[:-1]) <= width


def test_a_small_map_shows_its_numbers():
    ranks_LE = np.arange(12).reshape(3, 4)
    lines = heat_map(ranks_LE, 16, (1, 2, 5), width=60).plain.splitlines()
    assert [[int(word) for word in line.split()[1:]] for line in lines[:3]] == [
        [layer, *row] for layer, row in zip((1, 2, 5), ranks_LE.tolist(), strict=True)
    ]


def test_cells_have_the_colour_of_their_rank():
    ranks_LE = np.array([[0, 8, 16]])
    text = heat_map(ranks_LE, 16, (0,), width=60)
    backgrounds = re.findall(r"on (#\w+)", " ".join(str(span.style) for span in text.spans))
    assert backgrounds[:3] == [shade(0), shade(0.5), shade(1)]


def test_without_colour_a_large_map_is_made_of_characters():
    ranks_LE = np.tile(np.arange(33), (20, 4))[:, :128]
    text = heat_map(ranks_LE, 32, tuple(range(20)), width=100, has_colour=False)
    assert not [span for span in text.spans if "on" in str(span.style)]
    assert set(text.plain.splitlines()[0].split()[2]) <= set(RAMP)


def terminal(**options) -> tuple[io.StringIO, Console]:
    file = io.StringIO()
    options = {"force_terminal": True, "width": 80, "height": 30, "_environ": {}} | options
    return file, Console(file=file, **options)


def take_steps(console) -> None:
    with Progress(4, 0, console) as progress:
        progress.show_ranks(np.full((2, 4), 3), 8, (0, 1))
        progress.advance()
        progress.note("step 1: ranks [grow]")
        progress.show({"step": 1, "loss": 2.5, "tokens_per_second": 1234.0})
        progress.show({"step": 2, "eval_loss": 1.25})


def test_a_terminal_shows_map_bar_and_figures():
    file, console = terminal(color_system="truecolor")
    take_steps(console)
    shown = file.getvalue()
    assert "layer 0" in shown and "1/4" in shown and "1,234 tok/s" in shown
    assert "step 1: ranks [grow]" in shown and "48;2;" in shown  # a true-colour background
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_no_color_is_honoured():
    file, console = terminal(color_system="truecolor", no_color=True)
    take_steps(console)
    assert "48;2;" not in file.getvalue() and "layer 0" in file.getvalue()


def test_elsewhere_there_are_plain_lines(capsys):
    take_steps(Console(force_terminal=False))
    assert capsys.readouterr().out.splitlines() == [
        "step 1: ranks [grow]",
        "step 1/4  loss 2.5000  1,234 tok/s",
        "step 2/4  eval 1.2500",
    ]


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, None])
def test_a_process_looks_at_its_own_output(environment, tmp_path):
    """On a pseudo-terminal, with the variables that people set; None: into a pipe, FORCE_COLOR
    set.
    """
    (tmp_path / "steps.py").write_text(
        "import numpy as np\nfrom drlora_jax.reporting.progress import Progress\n"
        "with Progress(4, 0) as progress:\n"
        "    progress.show_ranks(np.full((2, 4), 3), 8, (0, 1))\n"
        "    progress.show({'step': 2, 'eval_loss': 1.25})\n"
    )
    variables = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    variables.pop("NO_COLOR", None)
    command = [sys.executable, str(tmp_path / "steps.py")]
    variables["PYTHONPATH"] = os.pathsep.join([os.getcwd(), variables.get("PYTHONPATH", "")])
    if environment is None:
        variables |= {"FORCE_COLOR": "1"}
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        assert result.stdout == "step 2/4  eval 1.2500\n"
        return
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=variables | environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    assert b"step 2/4  eval 1.2500" in shown
    assert (b"48;2;" in shown) == (environment == {})
    assert (b"layer 0" in shown) == (environment != {"TERM": "dumb"})


def test_memory_grows_with_what_is_held():
    before = peak_memory()["host_peak_bytes"]
    held = np.ones(before // 8 + (64 << 20) // 8)
    after = peak_memory()["host_peak_bytes"]
    assert after - before >= 32 << 20 and held.nbytes < after
