"""MoE-Sieve, PRILoRA and fixed patterns: ranks that are decided before step 1."""

import json

import numpy as np
import pytest

from drlora_jax.allocation import CapacityShapes
from drlora_jax.allocation.moe_sieve import sieve
from drlora_jax.errors import UserError
from drlora_jax.training.growth import profile
from drlora_jax.training.job import prepare
from drlora_jax.training.state import start
from tests.support.policies import make_policy
from tests.support.stepper import Stepper
from tests.support.tiny import OLMOE, tiny_config, write_rows, write_tiny_model

SHAPES = CapacityShapes(layers=2, projections=2, experts=5, max_rank=8)
RANKS_LE = [[0, 1, 2, 3, 4], [8, 0, 0, 1, 1]]


@pytest.mark.parametrize(("chosen", "budget"), [(1, 8), (2, 9), (3, 10), (5, 5), (4, 3)])
def test_sieve_gives_the_most_used_experts_all_ranks(chosen, budget):
    draw = np.random.default_rng(chosen)
    for count_E in (draw.integers(0, 4, 5), draw.random(5), np.zeros(5)):
        expected, order = [0] * 5, sorted(range(5), key=lambda expert: -count_E[expert])
        for turn in range(budget):
            expected[order[turn % chosen]] += 1
        assert sieve(count_E, chosen, budget).tolist() == expected


def test_sieve_refuses_a_budget_that_does_not_fit():
    with pytest.raises(UserError, match=r"10 ranks to 1 of 5 experts, up to 10 each.* raise it"):
        make_policy("moe_sieve", SHAPES, r_target=2, share=0.25, profile_rows=8)


@pytest.fixture(scope="module")
def sieved_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sieved")


@pytest.fixture(scope="module")
def sieved(sieved_folder):
    section = dict(kind="moe_sieve", share=0.5, profile_rows=16)
    return Stepper(sieved_folder, allocation=section)


def test_profile_counts_what_the_base_chooses(sieved):
    """Against the routing statistics of training steps at learning rate 0 over the same rows."""
    run = sieved.run
    batch, step = sieved.job.loader.batch, run.job.config.train.batch_size
    total_LE = 0
    for first in (0, step):
        lora, mask = sieved.position.state.lora, sieved.position.state.mask_LER
        _, _, stats = run.eval_step(sieved.params, lora, mask, batch(first))
        total_LE = total_LE + np.asarray(stats.count_E)
    count_LE = profile(run, sieved.params, start(run).state)["choices"]
    tokens = sum(int((batch(first).segment_ids_BT > 0).sum()) for first in (0, step))
    assert (count_LE.sum(axis=1) == 2 * tokens).all()  # two experts a valid token
    np.testing.assert_array_equal(count_LE, total_LE)
    ranks_LE = sieved.position.capacity.ranks_LE
    assert (np.sort(ranks_LE, axis=1) == [0, 0, 4, 4]).all()
    for ranks_E, count_E in zip(ranks_LE, count_LE, strict=True):
        assert count_E[ranks_E > 0].min() >= count_E[ranks_E == 0].max()


def test_profile_is_the_first_row_of_ranks(sieved):
    rows = [json.loads(line) for line in sieved.job.run_dir.ranks_file.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0]
    assert rows[0]["ranks"] == sieved.position.capacity.ranks_LE.tolist()
    np.testing.assert_allclose(np.sum(rows[0]["saliency"], axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("name", ["ranks.json", "ranks.jsonl"])
def test_pattern_reads_tables_and_last_rows(tmp_path, name):
    file = tmp_path / name
    rows = [{"step": 1, "ranks": [[0]]}, {"step": 2, "ranks": RANKS_LE}]
    text = json.dumps(RANKS_LE, indent=1)
    file.write_text(text if name == "ranks.json" else "\n".join(map(json.dumps, rows)) + "\n")
    policy = make_policy("pattern", SHAPES, pattern=str(file), r_target=2)
    assert policy.init().ranks_LE.tolist() == RANKS_LE and policy.budget == 10
    assert not any(policy.is_event(step) for step in range(100))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is absent|no such"),
        ("", "cannot be read"),
        ("{}", "cannot be read as ranks: 'ranks'"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git-lfs pointer"),
        ("[[1, 2], [3]]", "cannot be read"),
        ("[[1.5, 0, 0, 0, 0], [0, 0, 0, 0, 0]]", "must hold integers"),
        ("[[1, 2, 3, 4, 5]]", r"of shape \[2, 5\], got int64 of shape \[1, 5\]"),
        ("[[9, 0, 0, 0, 0], [1, 1, 1, 1, 1]]", r"from 0 to 9; they must be between 0 and .* \(8\)"),
        ("[[-1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]", "from -1 to 1"),
        ("[[1, 1, 1, 1, 1], [8, 3, 0, 0, 0]]", "MoE layer 1 has 11 ranks, more than .* = 10"),
    ],
)
def test_pattern_refusals(tmp_path, text, message):
    file = tmp_path / "ranks.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        make_policy("pattern", SHAPES, pattern=str(file), r_target=2)


def test_a_pattern_keeps_the_budget_of_each_layers_own_experts(tmp_path):
    file = tmp_path / "ranks.json"
    file.write_text("[[4, 0, 0, 0, 0], [2, 2, 2, 2, 2]]")
    options = dict(pattern=str(file), r_target=2, counts_L=(2, 5))
    policy = make_policy("pattern", SHAPES, **options)
    assert policy.budget == (4, 10)
    file.write_text("[[4, 1, 0, 0, 0], [2, 2, 2, 2, 2]]")
    with pytest.raises(UserError, match=r"layer 0 has 5 ranks, more than 2 experts .* = 4"):
        make_policy("pattern", SHAPES, **options)


@pytest.mark.parametrize(
    ("layers", "r_init", "r_target"), [(12, 4, 8), (5, 4, 5), (1, 2, 3), (2, 0, 4), (32, 8, 16)]
)
def test_prilora_rises_linearly(layers, r_init, r_target):
    """Every layer is less than a rank away from the line, and the sum is that of plain LoRA."""
    shapes = SHAPES._replace(layers=layers)
    policy = make_policy("prilora", shapes, r_init=r_init, r_target=r_target, r_max=64)
    ranks_LE = policy.init().ranks_LE
    rank_L = ranks_LE[:, 0]
    assert (ranks_LE == rank_L[:, None]).all() and ranks_LE.dtype == np.int32
    assert ranks_LE.sum() == layers * 5 * r_target and (np.diff(rank_L) >= 0).all()
    for layer, rank in enumerate(rank_L):
        share = r_init + 2 * (r_target - r_init) * layer / (layers - 1) if layers > 1 else r_target
        assert abs(rank - share) < 1
    assert policy.budget == tuple(ranks_LE.sum(axis=1))


def test_prilora_may_fall_and_stays_within_its_ends():
    falling = make_policy("prilora", SHAPES, r_init=6, r_target=4, r_max=6).init().ranks_LE
    assert falling[:, 0].tolist() == [6, 2]
    for r_init, message in ((9, "-1. in the last"), (1, "r_init .1. .* r_init .7. .*r_max .6.")):
        with pytest.raises(UserError, match=message):
            make_policy("prilora", SHAPES, r_init=r_init, r_target=4, r_max=6)


@pytest.mark.parametrize(
    ("rule", "r_target", "expected"), [("per_top_k", 9, 4), ("per_expert", 9, 2), ("fixed", 9, 9)]
)
@pytest.mark.parametrize("rank", [None, 3])
def test_a_rank_shared_by_experts(sieved_folder, rule, r_target, expected, rank):
    """Four experts, two a token; attention keeps the rank that was divided."""
    config = tiny_config(
        sieved_folder,
        "ruled",
        adapter=dict(rank=rank),
        allocation=dict(kind="uniform", r_target=r_target, rank_rule=rule),
    )
    job = prepare(config)
    assert job.policy.init().ranks_LE.tolist() == [[expected] * 4] * 2
    assert job.adapter.max_rank == expected and job.policy.budget == 4 * expected
    assert job.adapter.rank == (rank or r_target)
    again = prepare(job.config)  # what config.json keeps is divided no second time
    assert again.config == job.config and again.adapter == job.adapter


@pytest.mark.parametrize("rule, expected", [("per_top_k", 8), ("per_expert", 2)])
@pytest.mark.parametrize("kind", ["mixlora", "mola"])
def test_a_rank_shared_by_experts_of_the_adapter(tmp_path, kind, rule, expected):
    write_tiny_model(tmp_path / "model", OLMOE | {"model_type": "llama", "num_hidden_layers": 4})
    write_rows(tmp_path / "train.jsonl", 40)
    write_rows(tmp_path / "heldout.jsonl", 4)
    section = dict(kind="uniform", r_target=16, rank_rule=rule)
    adapter = dict(kind=kind, num_experts=8, experts_per_token=2, rank=None)
    job = prepare(tiny_config(tmp_path, adapter=adapter, allocation=section))
    assert (job.policy.init().ranks_LE == expected).all() and job.adapter.max_rank == expected
    assert job.adapter.rank == 16
    adapter |= dict(experts_per_layer="2468")
    with pytest.raises(UserError, match="gives layers different numbers"):
        prepare(tiny_config(tmp_path, adapter=adapter, allocation=section))


@pytest.mark.parametrize(
    ("allocation", "adapter", "message"),
    [
        (dict(r_target=1, rank_rule="per_top_k"), {}, "1 // 2 experts per token = 0"),
        (dict(kind="dr_lora", rank_rule="per_top_k"), {}, "is for kind=uniform, got kind=dr_"),
        (dict(rank_rule="per_expert"), dict(kind="lora"), "adapter.kind=lora does not have"),
        (dict(rank_rule="per_top_k"), dict(kind="mixlora", top_p=0.5), "adapter.top_p=0.5"),
    ],
)
def test_ranks_that_can_not_be_shared(sieved_folder, allocation, adapter, message):
    with pytest.raises(UserError, match=message):
        section = dict(kind="uniform") | allocation
        prepare(tiny_config(sieved_folder, "ruled", adapter=adapter, allocation=section))
