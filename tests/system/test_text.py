"""Numbers, names and errors as people read them."""

from drlora_jax.system.text import counted, did_you_mean, first_line, format_bytes


def test_counts_agree_with_their_nouns():
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert counted("1", "pass", "passes") == "1 pass"
    assert counted("1.5", "pass", "passes") == "1.5 passes"
    assert counted("1,000", "tensor") == "1,000 tensors"


def test_bytes():
    assert [format_bytes(n) for n in (1, 1536, 3 << 30)] == ["1 B", "1.5 KiB", "3.00 GiB"]


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


def test_slips_are_found_and_other_names_are_not():
    known = ("train", "test", "model")
    assert did_you_mean("trian", known) == "did you mean train?"
    assert (
        did_you_mean("tran", ("train", "strain", "x"), count=2) == "did you mean train or strain?"
    )
    shown = did_you_mean("trian", known, show=lambda name: f"data/{name}")
    assert shown == "did you mean data/train?"
    assert did_you_mean("xyz", known) == ""
