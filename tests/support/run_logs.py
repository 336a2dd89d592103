"""Run directories made by hand, for tests of what reads them."""

import json
import pathlib

import numpy as np

from drlora_jax.config import AllocationSection, RunSection, TrainConfig, TrainSection
from drlora_jax.runs.directory import RunDirectory

LAYERS = (1, 2, 4)  # a model whose layers 0 and 3 are dense
EXPERTS, R_INIT, R_TARGET, R_MAX = 5, 2, 4, 8
EVENTS = (10, 20, 30)


def random_ranks(draw) -> np.ndarray:
    return draw.integers(0, R_MAX + 1, (len(LAYERS), EXPERTS))


def write_run(
    directory: pathlib.Path, seed=0, made_with=True, budget=EXPERTS * R_TARGET, **train
) -> RunDirectory:
    """Forty steps with an evaluation every ten; the ranks of every event are drawn at random."""
    draw = np.random.default_rng(seed)
    config = TrainConfig(
        run=RunSection(dir=str(directory)),
        train=TrainSection(**({"steps": 40} | train)),
        allocation=AllocationSection(r_init=R_INIT, r_target=R_TARGET, r_max=R_MAX),
    )
    facts = {
        "versions": {"jax": "0.10.2"},
        "devices": {"kind": "cpu", "count": 1, "processes": 1, "mesh": {"data": 1}},
        "layers": list(LAYERS),
        "max_rank": R_MAX,
        "initial_ranks": [[R_INIT] * EXPERTS] * len(LAYERS),
        "budget": budget,
    }
    run = RunDirectory(str(directory))
    origin = {"base_fingerprint": "b" * 64, "data_fingerprint": "d" * 64}
    run.create(config, origin, 40, facts if made_with else None)
    for step in range(1, 41):
        row = {"step": step, "loss": 3 - step / 40 + draw.normal() / 50, "tokens": 100 * step}
        row |= {"learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 900.0 + step}
        row |= {"mfu": None, "host_peak_bytes": 2**30 + step} if made_with else {}
        if step % 10 == 0:
            row["eval_loss"] = 2.5 - step / 100
        run.log_metrics(row)
        if step in EVENTS:
            ranks_LE, load_LE = random_ranks(draw), draw.dirichlet(np.ones(EXPERTS), len(LAYERS))
            more = {"routing_load": load_LE.tolist()} if made_with else None
            saliency_LE = draw.random(ranks_LE.shape)
            run.log_ranks(step, LAYERS, ranks_LE, saliency_LE, budget, more)
    return run


def logged(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
