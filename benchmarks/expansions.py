"""Finds grouped products that a compiler turned into dense ones: arrays in a compiled module that
hold every row once per expert.
"""

import itertools
import re

from drlora_jax.models.architecture import MoeConfig
from drlora_jax.parallel.mesh import EXPERTS, shards_of

_ARRAY = re.compile(r"\b[a-z]+\d+\[([\d,]+)\]")


def dense_expansions(
    text: str,
    *,
    experts: int,
    rows: int,
    widths: tuple[int, ...],
    own: tuple[tuple[int, ...], ...] = (),
) -> list[str]:
    """Lists arrays of experts, rows and a width in any order, or with two of them merged into one
    axis.

    Args:
      rows: of the grouped product, on one device. widths: of its operands.
      own: sides of arrays that are there anyway, such as weights of as many columns as there are
        rows. An expansion has more arrays than the one that looks like them.
    """
    allowed = {tuple(sorted(sides)) for sides in own}
    sought = {
        tuple(sorted(sides)) for width in widths for sides in _sides(experts, rows, width)
    } - allowed
    found = {
        match[0]
        for match in _ARRAY.finditer(text)
        if tuple(sorted(int(size) for size in match[1].split(",") if size != "1")) in sought
    }
    return sorted(found)


def _sides(experts: int, rows: int, width: int):
    sides = (experts, rows, width)
    yield sides
    for one, other in itertools.combinations(range(3), 2):
        yield sides[one] * sides[other], sides[3 - one - other]


def step_expansions(run, text: str) -> list[str]:
    """Lists the dense expansions of the experts in a compiled training step."""
    config, section, sizes = run.job.model_config, run.job.config.train, run.mesh.shape
    if not isinstance(config.moe, MoeConfig):
        return []
    routing, hidden = config.moe.routing, config.moe.expert_dim
    experts = routing.num_experts // shards_of(run.mesh, EXPERTS)
    if experts == 1:  # every row is this expert's, or nobody's here
        return []
    row_shards = sizes["data"] * sizes["fsdp"]  # an expert group's tokens are gathered
    tokens = section.batch_size // section.micro_batches * section.sequence_length // row_shards
    rows, width = tokens * routing.experts_per_token, config.width
    return dense_expansions(
        text,
        experts=experts,
        rows=rows,
        widths=(width, hidden, 2 * hidden),
        own=own_arrays(config, experts, rows, tokens),
    )


def own_arrays(config, experts: int, rows: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    """Returns the axes of weights, rows, embeddings and logits, which exist without any
    expansion.
    """
    width, hidden = config.width, config.moe.expert_dim
    weights = [(experts, width, hidden), (experts, width, 2 * hidden)]
    weights += [(experts * one, other) for one, other in ((width, 2 * hidden), (hidden, width))]
    wide = (width, hidden, 2 * hidden, experts)
    plain = [(count, side) for count in (rows, tokens) for side in wide]
    plain += [(config.vocab_size, side) for side in (width, tokens)]
    return (*weights, *plain)
