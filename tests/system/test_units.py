"""Numbers as people read them."""

from drlora_jax.system.units import counted, format_bytes


def test_counts_agree_with_their_nouns():
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert counted("1", "pass", "passes") == "1 pass"
    assert counted("1.5", "pass", "passes") == "1.5 passes"
    assert counted("1,000", "tensor") == "1,000 tensors"


def test_bytes():
    assert [format_bytes(n) for n in (1, 1536, 3 << 30)] == ["1 B", "1.5 KiB", "3.00 GiB"]
