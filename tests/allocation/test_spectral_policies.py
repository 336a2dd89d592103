"""Allocations by the exponents of pretrained weights: AlphaLoRA as a policy, DR-LoRA's prior."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from drlora_jax import alpha
from drlora_jax.allocation import CapacityShapes, CapacityState
from drlora_jax.allocation.alphalora import (
    allocate_experts,
    alphalora_experts,
    alphalora_ranks,
)
from drlora_jax.allocation.base import Context
from drlora_jax.allocation.dr_lora import DrLora
from drlora_jax.allocation.exponents import spectral_start
from drlora_jax.allocation.growth import plan_growth
from drlora_jax.allocation.shares import divide
from drlora_jax.allocation.spectra import fit_tail
from drlora_jax.errors import UserError
from drlora_jax.interop.exponents import read_exponents
from drlora_jax.interop.hf_files import legacy_fingerprint, read_model_config
from drlora_jax.training import job as job_lib
from tests.support.dr_lora import RANKS_LE, SHAPES, make_policy, make_stats, stated_saliency
from tests.support.tiny import TINY_LLAMA, tiny_config, write_tiny_model

EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The MoE of the tiny config, a dense model, and the file that the command writes of each."""
    folder = tmp_path_factory.mktemp("spectral")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        tiny_config(folder)  # writes model and data
        (folder / "dense").mkdir()
        write_tiny_model(folder / "dense", TINY_LLAMA)
        for name in ("model", "dense"):
            out = ["--experts", "9", "--out", str(folder / f"{name}.json")]
            assert alpha.main([str(folder / name), *out]) == 0
        yield folder


def exponents_of(directory, file=None, estimator="fix_finger"):
    config = read_model_config(directory)
    layers = tuple(range(config.num_layers))
    return read_exponents(config, directory, layers, file=file, estimator=estimator)


# -------------------------------------------------------------------------------------- exponents


def stated_exponents(directory, estimator):
    """alpha by layer and by (layer, expert), from singular values of the tensors in the file."""
    layers, experts = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if weight.ndim != 2 or ".layers." not in name or name.endswith("mlp.gate.weight"):
            continue
        values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)[::-1] ** 2
        exponent = fit_tail(values, estimator).alpha
        layers.setdefault(int(name.split(".")[2]), []).append(exponent)
        if match := EXPERT.match(name):
            experts.setdefault(tuple(map(int, match.groups())), []).append(exponent)
    return layers, experts


@pytest.mark.parametrize("estimator", ["fix_finger", "median"])
def test_exponents_are_means_over_layers_and_experts(folder, estimator):
    layers, experts = stated_exponents(folder / "model", estimator)
    found = exponents_of(folder / "model", estimator=estimator)
    assert found.expert_LE.shape == (2, 4) and [len(layers[i]) for i in (0, 1)] == [16, 16]
    np.testing.assert_allclose(found.layer_L, [np.mean(layers[i]) for i in (0, 1)], rtol=1e-9)
    for place, alphas in experts.items():
        assert len(alphas) == 3
        np.testing.assert_allclose(found.expert_LE[place], np.mean(alphas), rtol=1e-9)


def test_the_file_of_the_command_says_the_same(folder):
    one, two = (exponents_of(folder / "model", file) for file in (None, str(folder / "model.json")))
    np.testing.assert_array_equal(one.layer_L, two.layer_L)
    np.testing.assert_array_equal(one.expert_LE, two.expert_LE)


def test_a_file_with_an_older_fingerprint_is_taken(folder, tmp_path):
    stored = json.loads((folder / "model.json").read_text())
    older = {"fingerprint": legacy_fingerprint(folder / "model")}
    assert older["fingerprint"] != stored["fingerprint"]
    (tmp_path / "alpha.json").write_text(json.dumps(stored | older))
    found = exponents_of(folder / "model", str(tmp_path / "alpha.json"))
    np.testing.assert_array_equal(found.layer_L, exponents_of(folder / "model").layer_L)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "it is absent"),
        ("{", "cannot be read as exponents"),
        ("[]", "cannot be read as exponents"),
        ({"layers": [{}]}, "cannot be read as exponents .'matrices'."),
        ({"fingerprint": "f" * 64}, "was computed for fingerprint f{12}, not [0-9a-f]{12}"),
        ({"estimator": "median"}, "its estimator is median, but allocation.alpha_estimator fix_f"),
        ({"layers": []}, "must have exponents above 1 for 2 layers"),
        ({"layers": [{"matrices": [{"expert": 0, "alpha": 1.0}]}] * 2}, "exponents above 1"),
        ({"layers": [{"matrices": [{"expert": 0, "alpha": "nan"}]}] * 2}, "exponents above 1"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(folder, tmp_path, change, message):
    file = tmp_path / "alpha.json"
    if isinstance(change, dict):
        file.write_text(json.dumps(json.loads((folder / "model.json").read_text()) | change))
    elif change:
        file.write_text(change)
    match = rf"alpha_file=.*cannot be used: .*{message}.* Write it with python -m drlora_jax.alpha"
    with pytest.raises(UserError, match=match):
        exponents_of(folder / "model", str(file))


def test_a_pointer_in_its_place_is_named(folder, tmp_path):
    file = tmp_path / "alpha.json"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(UserError, match=f"{file} is a git-lfs pointer"):
        exponents_of(folder / "model", str(file))


# ----------------------------------------------------------------------------------------- shares


def stated_division(alphas, total, beta, most):
    """Shares by bisection of the factor of alpha^beta; the rest by largest remainder."""
    weights = [(alpha / max(alphas)) ** beta for alpha in alphas]
    low, high = 0.0, 1e12
    for _ in range(300):
        middle = (low + high) / 2
        is_less = sum(min(most, middle * weight) for weight in weights) < total
        low, high = (middle, high) if is_less else (low, middle)
    shares = [min(most, high * weight) for weight in weights]
    counts = [int(share + 1e-9) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(2.0, 4.0), min_size=2, max_size=9, unique_by=lambda x: round(x, 3)),
    st.integers(8, 12),
    st.integers(0, 6),
    st.sampled_from([0.7, 1.3, 2.5]),
)
def test_division_under_a_cap(alphas, mean, above, beta):
    """With shares above 1 the floor has no say, and the numbers are those of the definition."""
    total, most = mean * len(alphas), mean + above
    got = divide(np.array(alphas), total, beta=beta, most=most)
    assert got.sum() == total and got.min() >= 1 and got.max() <= most
    if got.min() > 1:
        expected = np.array(stated_division(alphas, total, beta, most))
        assert np.abs(got - expected).max() <= 1  # remainders that are equal up to rounding
        assert (got != expected).sum() <= 2
    assert (np.diff(got[np.argsort(alphas)]) >= 0).all()  # more for larger exponents


def test_ranks_follow_the_exponents_of_experts():
    shapes = CapacityShapes(layers=2, projections=2, experts=3, max_rank=10)
    alpha_LE = np.array([[2.0, 4.0, 3.0], [2.0, 2.0, 8.0]])
    policy = alphalora_ranks(shapes, alpha_LE, r_target=4, beta=1.0)
    # Shares of 24 in 21sts: 2.29 4.57 3.43, 2.29 2.29 9.14.
    expected = [[2, 5, 4], [2, 2, 9]]
    ranks_LE = policy.init().ranks_LE
    assert ranks_LE.tolist() == expected and ranks_LE.dtype == np.int32
    assert policy.budget == (11, 13) and not any(map(policy.is_event, range(50)))
    capped = alphalora_ranks(shapes._replace(max_rank=6), alpha_LE, r_target=4, beta=1.0)
    # 6 for the last, and of the other 18 in 13ths: 2.77 5.54 4.15, 2.77 2.77.
    assert capped.init().ranks_LE.tolist() == [[3, 5, 4], [3, 3, 6]]
    with pytest.raises(UserError, match="r_target .11. is the mean .*r_max .10."):
        alphalora_ranks(shapes, alpha_LE, r_target=11, beta=1.0)


def test_experts_of_a_layer_are_its_first():
    shapes = CapacityShapes(layers=3, projections=3, experts=4, max_rank=5)
    policy = alphalora_experts(shapes, np.array([2.0, 4.0, 3.0]), total=7, rank=5, beta=2.5)
    expected = [[5, 0, 0, 0], [5, 5, 5, 5], [5, 5, 0, 0]]
    assert policy.init().ranks_LE.tolist() == expected and policy.budget == (5, 20, 10)
    with pytest.raises(UserError, match="allocation.experts=2: "):
        alphalora_experts(shapes, np.ones(3), total=2, rank=5, beta=2.5)


def test_experts_that_do_not_fit_are_refused_not_moved():
    """Another layer would otherwise get what `drlora_jax.alpha` gives to this one."""
    shapes = CapacityShapes(layers=3, projections=3, experts=4, max_rank=5)
    alpha_L = np.array([2.0, 4.0, 3.0])
    due_L = allocate_experts(alpha_L, 9)
    assert due_L.max() == due_L[1] == 5
    with pytest.raises(UserError, match="9 gives 5 experts to layer 1, .*set .*num_experts=5"):
        alphalora_experts(shapes, alpha_L, total=9, rank=5, beta=2.5)
    roomy = alphalora_experts(shapes._replace(experts=5), alpha_L, total=9, rank=5, beta=2.5)
    assert (roomy.init().ranks_LE > 0).sum(axis=1).tolist() == due_L.tolist()


# ------------------------------------------------------------------------------------------ prior


def test_a_prior_is_a_factor_of_the_saliency():
    draw = np.random.default_rng(3)
    alpha_LE, stats = draw.uniform(2, 6, RANKS_LE.shape), make_stats(1, RANKS_LE)
    plain_LE = stated_saliency(stats, RANKS_LE, gamma=1.2, decay=0.8)
    for power in (1.0, -0.5):
        policy = make_policy(spectral_prior=power, alpha=alpha_LE)
        _, _, event = policy.update(CapacityState(RANKS_LE), stats, 10)
        for layer, expert in np.ndindex(*RANKS_LE.shape):
            factor = (alpha_LE[layer, expert] / (sum(alpha_LE[layer]) / SHAPES.experts)) ** power
            expected = plain_LE[layer, expert] * factor
            assert event.saliency_LE[layer, expert] == pytest.approx(expected, rel=1e-5)
    assert "spectral prior" in policy.describe


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_a_spectral_start_is_the_layers_share_and_growth_goes_on_from_it(beta):
    alpha_LE = np.random.default_rng(4).uniform(2, 5, RANKS_LE.shape)
    rank, most = 4, SHAPES.max_rank
    first_LE = spectral_start(alpha_LE, rank, beta=beta, most=most)
    for alpha_E, ranks_E in zip(alpha_LE, first_LE, strict=True):
        weights = [alpha**beta for alpha in alpha_E]
        shares = [rank * len(weights) * weight / sum(weights) for weight in weights]
        if max(shares) <= most and min(shares) >= 1:
            assert all(abs(got - share) < 1 for got, share in zip(ranks_E, shares, strict=True))
        assert ranks_E.sum() == rank * len(weights) and 1 <= ranks_E.min() <= ranks_E.max() <= most


def test_growth_from_a_spectral_start_meets_the_budget():
    """Whatever is preferred: also the experts that start with most."""
    shapes = CapacityShapes(layers=2, projections=2, experts=6, max_rank=12)
    alpha_LE = np.random.default_rng(5).uniform(2, 4, (2, 6))
    first_LE = spectral_start(alpha_LE, 3, beta=2.5, most=12)
    arguments = dict(total_steps=60, r_init=3, r_target=6, interval=5, p_grow=0.3)
    arguments |= dict(warmup_ratio=0.1, spectral_start=True, alpha=alpha_LE)
    policy = make_policy(shapes, **arguments)
    assert policy.init().ranks_LE.tolist() == first_LE.tolist()
    state, stats = policy.init(), policy.init_stats()
    stats = stats._replace(frequency_LE=alpha_LE**4, updates_LE=np.ones((2, 6)))
    for step in range(61):
        if policy.is_event(step):
            stats = stats._replace(importance_LPER=np.ones(shapes))
            before = state.ranks_LE
            state, stats, _ = policy.update(state, stats, step)
            assert (state.ranks_LE >= before).all()
    assert state.ranks_LE.sum(axis=1).tolist() == [policy.budget] * 2 == [36, 36]
    assert state.ranks_LE.max() <= 12
    first_LE[0, 0] += 9
    fields = DrLora(r_init=3, interval=5, p_grow=0.3, warmup_ratio=0.1)
    with pytest.raises(UserError, match="the budget cannot be reached"):
        plan_growth(Context(shapes, 11, total_steps=60), fields, first_LE)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_accepted_start_reaches_the_budget_whatever_is_preferred(data):
    first_LE = np.array([data.draw(st.lists(st.integers(1, 7), min_size=4, max_size=4))], np.int32)
    rank = -(-int(first_LE.sum()) // 4)
    first_LE[0, first_LE[0].argmin()] += 4 * rank - first_LE.sum()
    shapes = CapacityShapes(layers=1, projections=1, experts=4, max_rank=10)
    context = Context(shapes, data.draw(st.integers(rank, 10)), total_steps=50)
    p_grow = data.draw(st.sampled_from([0.1, 0.3, 0.6]))
    fields = DrLora(r_init=rank, interval=5, p_grow=p_grow, warmup_ratio=0.1)
    try:
        policy = fields.grown_from(context, first_LE)
    except UserError as error:
        assert "cannot be reached" in str(error)
        return
    state, stats = policy.init(), policy.init_stats()
    for step in range(51):
        if policy.is_event(step):
            wanted = np.array([data.draw(st.permutations(range(1, 5)))], np.float64) ** 9
            stats = stats._replace(frequency_LE=wanted, importance_LPER=np.ones(shapes))
            state, stats, _ = policy.update(state, stats, step)
    assert state.ranks_LE.sum() == policy.budget and state.ranks_LE.max() <= 10


def test_an_expert_that_starts_with_most_does_not_stop_growth():
    """OLMoE's 64 experts, 8 to 16 of 32: what the others have free is enough."""
    first_LE = np.full((2, 64), 8, np.int32)
    first_LE[1, 0], first_LE[1, 1:25] = 32, 7
    shapes = CapacityShapes(layers=2, projections=2, experts=64, max_rank=32)
    context = Context(shapes, 16, total_steps=3750, warmup_ratio=0.03)
    assert DrLora().grown_from(context, first_LE).budget == 1024


# --------------------------------------------------------------------------------- from the config


def test_jobs_have_the_ranks_of_their_exponents(folder):
    found = exponents_of(folder / "model")
    section = dict(kind="alphalora", r_target=3, r_max=8, alpha_beta=1.5)
    job = job_lib.prepare(tiny_config(folder, allocation=section))
    weight_LE = found.expert_LE**1.5
    share_LE = 24 * weight_LE / weight_LE.sum()
    assert np.abs(job.policy.init().ranks_LE - share_LE).max() < 1
    assert job.adapter.max_rank == 8
    grown = job_lib.prepare(tiny_config(folder, allocation=dict(spectral_prior=1.0)))
    assert "spectral prior" in grown.policy.describe
    started = job_lib.prepare(tiny_config(folder, allocation=dict(spectral_start=True)))
    expected_LE = spectral_start(found.expert_LE, 1, beta=2.5, most=4)
    assert started.policy.init().ranks_LE.tolist() == expected_LE.tolist()
    dense = dict(kind="alphalora", experts=7, alpha_file=str(folder / "dense.json"))
    config = tiny_config(
        folder,
        model=dict(path=str(folder / "dense")),
        adapter=dict(kind="mixlora", num_experts=4),
        allocation=dense,
    )
    job = job_lib.prepare(config)
    written = json.loads((folder / "dense.json").read_text())
    expected = allocate_experts([layer["alpha"] for layer in written["layers"]], 7)
    assert (job.policy.init().ranks_LE == 2).sum(axis=1).tolist() == expected.tolist()
    assert job.adapter.max_rank == 2


MIXLORA = dict(kind="mixlora", num_experts=4)


@pytest.mark.parametrize(
    ("allocation", "adapter", "message"),
    [
        (dict(kind="alphalora"), MIXLORA, "mola need it.* Got None with adapter.kind=mixlora"),
        (dict(kind="alphalora", experts=0), {}, "allocation.experts must be greater than 0"),
        (
            dict(kind="alphalora", experts=13),
            MIXLORA,
            "experts=13 do not fit into 3 layers of .*=4",
        ),
        (dict(kind="alphalora", r_target=5), {}, "r_target .5. is the mean rank"),
        (dict(kind="adalora", r_init=4, spectral_prior=1.0), {}, "got kind=adalora; leave it out"),
        (dict(released=True, spectral_prior=1.0), {}, "released=True"),
        (
            dict(spectral_prior=1.0),
            MIXLORA,
            "_prior .* of adapter.kind=mixlora are new",
        ),
        (
            dict(spectral_start=True),
            MIXLORA,
            "_start .* of adapter.kind=mixlora are new",
        ),
        (dict(spectral_start=True, kind="random"), {}, "is for kind=dr_lora, got kind=random"),
        (dict(spectral_start=True, r_init=0), {}, "set r_init to 1 or more"),
    ],
)
def test_what_can_not_be_is_refused_before_the_analysis(
    folder, monkeypatch, allocation, adapter, message
):
    monkeypatch.setattr(job_lib, "read_exponents", lambda *_, **__: pytest.fail("not refused"))
    model = dict(path=str(folder / ("dense" if adapter else "model")))
    with pytest.raises(UserError, match=message):
        job_lib.prepare(tiny_config(folder, model=model, adapter=adapter, allocation=allocation))
