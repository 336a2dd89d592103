"""What a run says of its passes over the data, and of rows that are longer than its model."""

import numpy as np
import pytest

from drlora_jax.config import TrainSection
from drlora_jax.data.loader import Loader
from drlora_jax.data.tokenize import Document
from drlora_jax.training.passes import length_lines, passes_lines


def loader(lengths, *, pack=True, sequence_length=64) -> Loader:
    documents = [Document(np.arange(n), np.ones(n, bool)) for n in lengths]
    return Loader(
        documents, sequence_length=sequence_length, batch_size=4, seed=0, pad_id=0, pack=pack
    )


def said(steps, *, epochs=None, batch_size=4, lengths=(16,) * 40, pack=True):
    given = {"steps": None, "epochs": epochs} if epochs else {"steps": steps}
    section = TrainSection(**given, batch_size=batch_size)
    return passes_lines(loader(lengths, pack=pack), section, steps)


def test_rows_and_passes():
    (line,) = said(1, lengths=(40,) * 30)
    assert line == (
        "30 packed rows per epoch; 1 step of 4 rows: 0.13 passes (0.13 without packing)"
    )
    (line,) = said(30, pack=False)
    assert line == "40 rows of one document per epoch; 30 steps of 4 rows: 3 passes"
    (line,) = said(1, lengths=(40,), batch_size=1)
    assert line == "1 packed row per epoch; 1 step of 1 row: 1 pass (1 without packing)"


def test_packed_rows_that_are_more_passes_than_was_meant():
    line, warning = said(20)
    assert line.startswith("10 packed rows per epoch; 20 steps of 4 rows: 8 passes (2 without")
    assert warning.startswith("warning: packing puts 4.0 documents into a row")
    assert "8 passes instead of 2" in warning and "data.pack=false" in warning
    assert len(said(20, epochs=8)) == 1  # who counts in epochs has said so
    assert len(said(2)) == 1  # less than a pass repeats nothing
    assert len(said(20, lengths=(32,) * 40)) == 1  # two documents a row


@pytest.mark.parametrize("epochs", [None, 10])
@pytest.mark.parametrize("pack", [True, False])
def test_many_passes(pack, epochs):
    rows = 10 if pack else 40
    _, warning = said(rows * 10 // 4, epochs=epochs, pack=pack)
    assert warning.startswith("warning: 10 passes over the training data")
    assert not [line for line in said(rows * 9 // 4, epochs=9, pack=pack) if "warning" in line]


def test_a_batch_larger_than_the_data():
    """One epoch is a step at least, so counting in epochs would not help."""
    _, warning = said(5, lengths=(16,) * 4, batch_size=4)
    assert warning == (
        "warning: train.batch_size=4 is larger than the data (1 row per epoch), so each step "
        "repeats rows: 20 passes in total; lower train.batch_size"
    )
    _, warning = said(10, lengths=(64,) * 4, batch_size=4)
    assert warning.endswith("over the training data; for one pass set train.epochs=1")


def test_rows_longer_than_the_positions_of_the_model():
    rows = loader((16, 60), sequence_length=64)
    assert length_lines(rows, None) == length_lines(rows, 64) == []
    (line,) = length_lines(rows, 48)
    assert line.startswith("warning: train.sequence_length=64 is longer than the 48 positions")
    assert line.endswith("has 60 tokens, and results beyond position 48 are unreliable")
    (line,) = length_lines(loader((16, 20), sequence_length=64), 48)
    assert line.endswith("the longest document has 20 tokens, so all fit")
