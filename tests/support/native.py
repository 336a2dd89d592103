"""Numbers of the compiled kernels against the loops, for tests and for commands of theirs."""

import jax
import numpy as np

from drlora_jax.ops.native import library
from tests.support import attention
from tests.support.expert_mlps import (
    SPEC,
    groups,
    make_inputs,
    random_like,
    reference,
    relative_error,
    value_and_pull,
)


def check_numbers():
    """Some of the cases of the other tests, in this process."""
    assert library.why_not() is None, library.why_not()
    cases = (
        (groups(70, 0, 13, 1), ("gate_up", "down"), dict(width=37, hidden=70, ranks=18)),
        (groups(70, 0, 13, 1), ("gate", "up", "down"), dict(width=37, hidden=70, ranks=18)),
        # Deeper than a packed panel.
        (groups(9, 4), ("gate_up", "down"), dict(width=1100, hidden=1050, ranks=3)),
    )
    for expert_TK, roles, sizes in cases:
        inputs = make_inputs(expert_TK, int(expert_TK.max()) + 1, roles, **sizes)
        dy = random_like(inputs[0])
        y, (dx, dp, *_, d_lora) = reference(inputs, np.asarray(dy, np.float64), "silu")
        got_y, (got_dx, got_dp, *_, got_lora) = value_and_pull(inputs, dy, SPEC, "native")
        pairs = zip(
            jax.tree.leaves((got_y, got_dx, got_dp, got_lora)),
            jax.tree.leaves((y, dx, dp, d_lora)),
            strict=True,
        )
        assert all(relative_error(*pair) <= 1e-5 for pair in pairs)
    for options in attention.CASES.values():
        inputs = attention.make_inputs()
        got = np.asarray(attention.run(*inputs, **options, backend="native"))
        expected = attention.loop_attention(*inputs, **options)
        is_real = attention.SEGMENTS > 0
        np.testing.assert_allclose(got[is_real], expected[is_real], atol=1e-5)
