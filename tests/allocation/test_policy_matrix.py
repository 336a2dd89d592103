"""Every allocation with every placement: each cell takes 20 steps, or is refused with its reason.

A new placement or policy is a row in PLACEMENTS or KINDS, and a reason for each cell that can not
be in REFUSED. All cells allocate four ranks, so that a placement's cells share their first state,
and those whose statistics are the same share the compiled step.
"""

import functools
import json
import pathlib
import re
import typing
from typing import NamedTuple

import jax
import numpy as np
import pytest

from drlora_jax import alpha, train
from drlora_jax.allocation import CapacityState, StepStats, masks_from_ranks
from drlora_jax.config import AdapterSection, AllocationSection
from drlora_jax.data.loader import split_micro_batches
from drlora_jax.errors import UserError
from drlora_jax.interop.hf_read import load_params
from drlora_jax.training.growth import grow
from drlora_jax.training.job import prepare
from drlora_jax.training.program import initial_state
from drlora_jax.training.step import TrainState
from tests.support.tiny import OLMOE, TINY_LLAMA, tiny_config, write_rows, write_tiny_model

METHODS = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"
STEPS, RANKS = 20, 4
NO_EXPERTS = "adapter.kind=lora has no experts to share ranks among"


class Placement(NamedTuple):
    base: dict  # config.json
    adapter: dict
    allocation: dict = {}  # by kind of policy, where it differs from KINDS


PLACEMENTS = {
    "expert_lora": Placement(OLMOE, dict(targets=("up",))),
    "mixlora": Placement(
        TINY_LLAMA,
        dict(targets=("up",), num_experts=4),
        dict(alphalora=dict(r_target=RANKS, experts=7)),
    ),
    "mola": Placement(
        TINY_LLAMA,
        dict(targets=("up", "q"), num_experts=4),
        dict(alphalora=dict(r_target=RANKS, experts=7)),
    ),
    "lora": Placement(TINY_LLAMA, dict(targets=("up",))),
    "shared_expert_lora": Placement(OLMOE, dict(targets=("up",))),
}
KINDS = {
    "uniform": dict(r_target=RANKS),
    "dr_lora": dict(r_init=1, r_target=2),
    "random": dict(r_init=1, r_target=2),
    "adalora": dict(r_init=RANKS, r_target=2),
    "moe_sieve": dict(r_target=2, share=0.5, profile_rows=8),
    "usage": dict(r_init=1, r_target=2, profile_rows=8),
    "prilora": dict(r_init=0, r_target=2),
    "alphalora": dict(r_target=2),
    "pattern": dict(r_target=2),
}
REFUSED = {(kind, "lora"): NO_EXPERTS for kind in KINDS if kind != "uniform"}
REFUSED |= {
    (kind, placement): "needs a trained router"
    for kind in ("moe_sieve", "usage")
    for placement in ("mixlora", "mola")
}
REFUSED["adalora", "shared_expert_lora"] = "the experts of a layer share these ranks"
CELLS = [(kind, placement) for placement in PLACEMENTS for kind in KINDS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with every base and the exponents of its weights; and what cells share."""
    folder = tmp_path_factory.mktemp("matrix")
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "heldout.jsonl", 4, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name, placement in PLACEMENTS.items():
            (folder / name / "model").mkdir(parents=True)
            write_tiny_model(folder / name / "model", placement.base)
            out = ["--experts", "9", "--out", str(folder / name / "alpha.json")]
            assert alpha.main([str(folder / name / "model"), *out]) == 0
    return World(folder)


class World:
    def __init__(self, folder: pathlib.Path):
        self.folder, self._steps = folder, {}

    def config(self, kind: str, placement: str):
        folder, section = self.folder / placement, PLACEMENTS[placement]
        allocation = dict(kind=kind, r_max=RANKS) | KINDS[kind]
        if AllocationSection.has(kind, "interval"):
            allocation["interval"] = 5
        allocation |= section.allocation.get(kind, {})
        if kind == "alphalora":
            allocation["alpha_file"] = str(folder / "alpha.json")
        if kind == "pattern":
            layers = section.base["num_hidden_layers"]
            allocation["pattern"] = str(folder / "ranks.json")
            (folder / "ranks.json").write_text(
                json.dumps([[0, 1, 3, 4], [2] * 4, [4, 4, 0, 0]][:layers])
            )
        data = {name: (str(self.folder / f"{name}.jsonl"),) for name in ("train", "heldout")}
        return tiny_config(
            folder,
            kind,
            model=dict(remat="none"),
            data=dict(path=data["train"], eval_path=data["heldout"]),
            train=dict(steps=STEPS, batch_size=4, sequence_length=32),
            adapter=dict(kind=placement, dropout=0.0, rank=2) | section.adapter,
            allocation=allocation,
        )

    @functools.cache  # noqa: B019  (of a fixture)
    def first(self, placement: str):
        """Base weights, factors and moments before step 1: the same in all cells of a placement."""
        run = train.build(prepare(self.config("uniform", placement)))
        params = load_params(run.job.model_config, run.job.directory, run.abstract_params)
        make = jax.jit(
            lambda: initial_state(run.job, run.tx, run.first_lora()),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, run.abstract_state),
        )
        state = make()
        return params, *jax.device_get((state.step, state.lora, state.opt_state))

    def compiled(self, run: train.Run, placement: str):
        """The step, ahead of time: it takes one set of shapes and shardings and no other. A policy
        is in it by its statistics only.
        """
        policy, (layers, experts, ranks) = run.job.policy, run.abstract_state.mask_LER.shape
        shapes_LPER = (layers, len(run.job.adapter.expert_roles()), experts, ranks)
        shapes = (1, *shapes_LPER), (1, layers, experts), (1, layers, experts), (1,)
        measured = StepStats(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))
        like = jax.ShapeDtypeStruct(shapes_LPER, np.float32)
        measured = measured._replace(measured={each.name: like for each in policy.measures})
        uses = jax.make_jaxpr(policy.accumulate)(run.abstract_state.stats, measured)
        key = placement, str(uses), policy.measures
        if key not in self._steps:
            self._steps[key], _ = train.compile_step(run)
        return self._steps[key]


def expert_rows(tree) -> dict[str, np.ndarray]:
    """Path -> [L, E, R, ...] of the experts' factors, or of their moments."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
        if len(path) > 3 and path[3].key.endswith("_lora")
    }


def check_state(run, position, initial):
    """The active ranks are a prefix; what is not active is as before step 1."""
    state, ranks_LE = jax.device_get(position.state), position.capacity.ranks_LE
    np.testing.assert_array_equal(state.mask_LER, masks_from_ranks(ranks_LE, RANKS))
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for path, value in expert_rows(state.lora).items():
        is_inactive = state.mask_LER[..., None] == 0
        if value.shape[1] == 1:  # shared: a row is used where any expert has its rank
            is_inactive = is_inactive.all(axis=1, keepdims=True)
        np.testing.assert_array_equal(value * is_inactive, initial[path] * is_inactive)
        for moments in (adam.mu, adam.nu):
            assert not (expert_rows(moments)[path] * is_inactive).any()
        if path.endswith("['b']"):
            assert not (value * is_inactive).any()


@pytest.mark.parametrize(("kind", "placement"), [cell for cell in CELLS if cell not in REFUSED])
def test_a_cell_trains(world, kind, placement):
    run = train.build(prepare(world.config(kind, placement)))
    job, policy = run.job, run.job.policy
    job.run_dir.create(job.config, job.origin, STEPS)
    params, step, lora, opt_state = world.first(placement)
    compiled, initial = world.compiled(run, placement), expert_rows(lora)

    def begin(capacity: CapacityState):
        mask_LER = masks_from_ranks(capacity.ranks_LE, job.adapter.max_rank)
        state = TrainState(step, lora, opt_state, mask_LER, policy.init_stats())
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, run.abstract_state))
        return train.Position(state, capacity, 0)

    position, losses, events = begin(policy.init()), [], 0
    if policy.profile is not None:
        first = split_micro_batches(job.loader.batch(0), 1)
        _, metrics = compiled(params, position.state, first)
        capacity, _ = policy.profile.decide({"choices": np.asarray(metrics["load_LE"])})
        position = begin(capacity)
    check_state(run, position, initial)
    for index in range(STEPS):
        batch = split_micro_batches(job.loader.batch(4 * index), 1)
        state, metrics = compiled(params, position.state, batch)
        position = position._replace(state=state)
        losses.append(float(metrics["loss"]))
        if policy.is_event(index + 1):
            position, events = grow(run, position, index + 1), events + 1
            check_state(run, position, initial)
    check_state(run, position, initial)
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])
    spent_L = position.capacity.ranks_LE.sum(axis=1)
    if kind == "pattern":
        assert (spent_L <= policy.budget).all()
    else:
        np.testing.assert_array_equal(spent_L, np.broadcast_to(policy.budget, spent_L.shape))
    assert (events > 0) == (kind in ("dr_lora", "random", "adalora"))
    assert policy.last_event <= STEPS


@pytest.mark.parametrize(("kind", "placement"), REFUSED)
def test_a_cell_that_can_not_be_says_why(world, kind, placement):
    with pytest.raises(UserError, match=REFUSED[kind, placement]):
        prepare(world.config(kind, placement))


def test_the_matrix_is_whole():
    """Whoever adds a policy or a placement to the config says here what goes with what."""
    kinds = typing.get_type_hints(AllocationSection)["kind"]
    placements = typing.get_type_hints(AdapterSection)["kind"]
    assert set(KINDS) == set(typing.get_args(kinds))
    assert set(PLACEMENTS) == set(typing.get_args(placements))


def test_the_table_of_the_methods_says_the_same():
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in METHODS.read_text().split("\n\n")[2].splitlines()
    )
    placements = [re.match("`(.*?)`", cell)[1] for cell in head[1:]]
    assert placements == list(PLACEMENTS)
    table = {row[0].strip("`"): row[1:] for row in rows}
    for kind, placement in CELLS:
        cell = table[kind][placements.index(placement)]
        assert cell and cell.startswith("refused: ") == ((kind, placement) in REFUSED)
