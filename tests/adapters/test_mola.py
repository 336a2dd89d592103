"""MoLA: routed LoRA experts on every matrix, against a loop over tokens and experts, and as a whole
run whose experts a layer AlphaLoRA's file gives."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax import alpha, export, inspect, train
from drlora_jax.adapters.expert_counts import resolve_counts
from drlora_jax.adapters.lora import Lora
from drlora_jax.adapters.rank_trees import gates_tree
from drlora_jax.adapters.targets import coverage, resolve_targets
from drlora_jax.allocation import CapacityShapes
from drlora_jax.config import AdapterSection, AllocationSection, MeshSection, TrainConfig
from drlora_jax.config.resolve import make_adapter, make_policy
from drlora_jax.errors import UserError
from drlora_jax.inference.generation import Generator
from drlora_jax.inference.model import load_run
from drlora_jax.models.architecture import DenseFfnConfig, RoutingConfig
from drlora_jax.models.attention import Attention
from drlora_jax.models.families import parse_config
from drlora_jax.models.ffn import DenseFfn
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder
from drlora_jax.training.job import prepare
from drlora_jax.training.step import AuxiliaryWeights, batch_loss, init_lora
from tests.support.llama import ALL, LLAMA, LLAMA_2_7B, count, largest_error, logged
from tests.support.tiny import (
    OLMOE,
    TINY_LLAMA,
    random_params,
    tiny_config,
    write_rows,
    write_tiny_model,
)

WIDTH, HIDDEN, EXPERTS, RANK, SCALE = 12, 20, 5, 3, 2.0
RANKS_E = np.array([2, 0, 3, 1, 0])  # experts 1 and 4 are closed
ROLES = ("gate", "up", "down")


def config_with(targets=ALL, rank=8, **adapter) -> TrainConfig:
    section = AdapterSection(kind="mola", targets=targets, dropout=0.0, **adapter)
    return TrainConfig(
        adapter=section, allocation=AllocationSection(kind="uniform", r_target=rank, r_max=rank)
    )


def adapted(values: dict, config: TrainConfig) -> Decoder:
    model_config = parse_config(values)
    return Decoder(model_config, DecoderOptions(adapter=make_adapter(config, model_config)))


def drawn(tree, seed=0, size=1.0):
    """Random arrays like a tree of shapes: nothing is compiled for them."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (size * draw.normal(size=leaf.shape)).astype("f4"), tree)


def shapes_of(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)


# -------------------------------------------------------------------------------------- one FFN


@pytest.fixture(scope="module")
def ffn():
    """A dense FFN with three routed projections, variables with random factors, and inputs whose
    last row ends in padding."""
    adapter = dataclasses.replace(
        make_adapter(config_with(), parse_config(LLAMA)),
        paths=frozenset(ROLES),
        scale=SCALE,
        max_rank=RANK,
        own_routing=RoutingConfig(EXPERTS, 2, normalize=True),
    )
    module = DenseFfn(DenseFfnConfig(HIDDEN), DecoderOptions(adapter=adapter))
    x_BTD = drawn(jnp.zeros((2, 3, WIDTH)))
    segments_BT = np.array([[1, 1, 1], [1, 1, 0]], np.int32)
    shapes = shapes_of(module, x_BTD, segments_BT)
    open_ER = (np.arange(RANK) < RANKS_E[:, None]).astype("f4")
    mask = jax.tree.map(lambda _: open_ER, shapes["rank_mask"])
    lora = drawn(shapes["lora"], 1, 0.5)
    params = drawn(shapes["params"], 2, 0.2)
    return module, {"params": params, "lora": lora, "rank_mask": mask}, x_BTD, segments_BT


def by_hand(xp, variables, x_BTD, chosen=None):
    """Token by token, and of the open experts the two best one at a time, each with weights of its
    own; and the experts chosen, role by role in the order of tokens. `xp` is NumPy, which chooses,
    or jax.numpy with a choice that was made."""
    params, lora, mask = (variables[name] for name in ("params", "lora", "rank_mask"))
    open_E, made = np.flatnonzero(RANKS_E), {role: [] for role in ROLES}
    given = {role: iter((chosen or made)[role]) for role in ROLES}

    def merged(role, e):
        factors, gate_R = lora[f"{role}_lora"], mask[f"{role}_lora"]["gate"][e]
        update = factors["a"][e].T @ (gate_R[:, None] * factors["b"][e])
        return params[role]["kernel"] + SCALE * update

    weights = {(role, e): merged(role, e) for role in ROLES for e in open_E}

    def project(role, x_D):
        logits_E = x_D @ lora[f"{role}_router"]["router"]
        best = next(given[role]) if chosen else sorted(open_E, key=lambda e: -logits_E[e])[:2]
        made[role].append(best)
        p = [xp.exp(logits_E[e]) for e in best]
        return sum(p[k] / sum(p) * (x_D @ weights[role, e]) for k, e in enumerate(best))

    rows = []
    for x_D in x_BTD.reshape(-1, WIDTH):
        gate_F = project("gate", x_D)
        rows.append(project("down", gate_F / (1 + xp.exp(-gate_F)) * project("up", x_D)))
    return xp.stack(rows).reshape(x_BTD.shape), made


def test_equals_a_loop_over_tokens_and_experts(ffn):
    module, variables, x_BTD, segments_BT = ffn
    weights_BTD = drawn(x_BTD, 3)

    def total(run):
        def function(lora, mask, x_BTD):
            y_BTD = run(variables | {"lora": lora, "rank_mask": mask}, x_BTD)
            return jnp.sum(y_BTD * weights_BTD), y_BTD

        return jax.value_and_grad(function, (0, 1, 2), has_aux=True)

    args = (variables["lora"], variables["rank_mask"], x_BTD)
    ours = jax.jit(total(lambda values, x: module.apply(values, x, segments_BT)[0]))(*args)
    _, chosen = by_hand(np, variables, x_BTD)
    loop = jax.jit(total(lambda values, x: by_hand(jnp, values, x, chosen)[0]))(*args)
    assert largest_error(ours[0][1], loop[0][1]) <= 1e-5
    assert largest_error(ours[1], loop[1]) <= 1e-5
    closed = RANKS_E == 0  # what has no rank is as if it were not there
    for role in ROLES:
        assert not np.asarray(ours[1][0][f"{role}_router"]["router"])[:, closed].any()
        assert not np.asarray(ours[1][0][f"{role}_lora"]["a"])[closed].any()


def test_statistics_are_of_the_routers_without_padding(ffn):
    module, variables, x_BTD, segments_BT = ffn
    _, routed = jax.jit(module.apply)(variables, x_BTD, segments_BT)
    _, chosen = by_hand(np, variables, x_BTD)
    valid = np.flatnonzero(np.asarray(segments_BT).reshape(-1))
    assert len(routed) == 3
    for stats, role in zip(routed, ROLES, strict=True):
        best = [chosen[role][token] for token in valid]
        every = np.bincount(np.ravel(best), minlength=EXPERTS)
        np.testing.assert_array_equal(stats.count_E, every)
        first = np.bincount([pair[0] for pair in best], minlength=EXPERTS)
        np.testing.assert_array_equal(stats.first_E, first)
        np.testing.assert_allclose(float(stats.weight_E.sum()), valid.size, rtol=1e-6)
        np.testing.assert_allclose(float(stats.probability_E.sum()), valid.size, rtol=1e-6)
        assert float(stats.experts) == 3


def test_a_layer_with_fewer_experts_uses_all(ffn):
    """One open expert of five: plain LoRA with its factors."""
    module, variables, x_BTD, segments_BT = ffn
    only = np.zeros((EXPERTS, RANK), "f4")
    only[2] = 1.0
    alone = variables | {"rank_mask": jax.tree.map(lambda _: only, variables["rank_mask"])}
    y_BTD, routed = jax.jit(module.apply)(alone, x_BTD, segments_BT)
    assert all(stats.count_E.tolist() == [0, 0, 5, 0, 0] for stats in routed)

    def project(role, x):
        factors = variables["lora"][f"{role}_lora"]
        added = factors["a"][2].T @ factors["b"][2]
        return x @ (variables["params"][role]["kernel"] + SCALE * added)

    hidden = jax.nn.silu(project("gate", x_BTD)) * project("up", x_BTD)
    assert largest_error(y_BTD, project("down", hidden)) <= 1e-5


# ------------------------------------------------------------------------------------ whole models

TOKENS_BT = np.random.default_rng(1).integers(0, 64, (2, 11), np.int32)
INPUTS = (TOKENS_BT, np.ones_like(TOKENS_BT), np.tile(np.arange(11, dtype=np.int32), (2, 1)))


def test_starts_as_its_base_and_counts_every_layer():
    model = adapted(LLAMA, config_with(("q", "down"), experts_per_layer="2,1,4"))
    shapes = shapes_of(model, *INPUTS)
    variables = {"params": random_params(model.config), "lora": drawn(shapes["lora"])}
    for module, role in (("attention", "q"), ("mlp", "down")):
        variables["lora"]["segment_0"]["layer_0"][module][f"{role}_lora"]["b"][:] = 0
    open_LE = np.arange(4) < np.array([2, 1, 4])[:, None]
    gate_LPER = jnp.asarray(np.tile(open_LE[:, None, :, None], (1, 2, 1, 8)), jnp.float32)
    variables["rank_mask"] = gates_tree(model, gate_LPER)
    y, stats = jax.jit(model.apply)(variables, *INPUTS)
    base = Decoder(parse_config(LLAMA), DecoderOptions())
    expected, _ = jax.jit(base.apply)({"params": variables["params"]}, *INPUTS)
    assert float(jnp.abs(y - expected).max()) <= 1e-6
    np.testing.assert_allclose(stats.experts, [2, 1, 4], rtol=1e-6)
    # min(K, experts) a token
    np.testing.assert_allclose(stats.count_E.sum(axis=1), [44, 22, 44], rtol=1e-6)
    assert not np.asarray(stats.count_E)[~open_LE].any()


def test_one_expert_of_attention_is_plain_lora():
    """Values and gradients; the FFN's projections are the same function."""
    routed = adapted(LLAMA, config_with(num_experts=1, experts_per_token=1))
    adapter = routed.options.adapter.below("segment_0").below("layer_0").below("attention")
    place = dataclasses.replace(routed.options, adapter=adapter)
    plain = Lora(place.adapter.paths, scale=place.adapter.scale, rank=8)
    config = routed.config.segments[0].unit[0].attention
    x_BTD = drawn(jnp.zeros((2, 11, 16)))
    ours = Attention(config, place, 1e-5)
    theirs = Attention(config, dataclasses.replace(place, adapter=plain), 1e-5)
    shapes = shapes_of(ours, x_BTD, *INPUTS[1:])
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, "f4"), shapes["rank_mask"])
    variables = {"params": drawn(shapes["params"], 1, 0.2), "rank_mask": ones}
    lora = drawn(shapes["lora"], 2, 0.2)

    def as_plain(tree):
        pairs = {role: tree[f"{role}_lora"] for role in "qkvo"}
        return {
            role: {"lora": {side: pair[side][0] for side in ("a", "b")}}
            for role, pair in pairs.items()
        }

    def loss(module, others):
        return lambda lora: jnp.sum(
            module.apply(others | {"lora": lora}, x_BTD, *INPUTS[1:])[0] ** 2
        )

    value, grads = jax.jit(jax.value_and_grad(loss(ours, variables)))(lora)
    params = {"params": variables["params"]}
    expected = jax.jit(jax.value_and_grad(loss(theirs, params)))(as_plain(lora))
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    assert largest_error(as_plain(grads), expected[1]) <= 1e-5


def test_parameters_of_llama_2_7b():
    """105,635,840 with the routers, as published for 5 experts of rank 8 a layer."""
    config = config_with(experts_per_layer="5555")
    model = adapted(LLAMA_2_7B, config)
    lora = jax.eval_shape(lambda: init_lora(model, jax.random.key(0)))
    assert count(lora) == 105_635_840
    rows = coverage(model.config, model.options.adapter, ALL)
    assert sum(row.trained for row in rows) == 105_635_840
    uneven = adapted(LLAMA_2_7B, config_with(experts_per_layer="2468"))
    rows = coverage(uneven.config, uneven.options.adapter, ALL)
    assert sum(row.trained for row in rows) == 105_635_840  # 20 experts in four quarters, too
    assert any("2 to 8 LoRA experts" in row.status for row in rows)


def test_experts_per_layer(tmp_path):
    assert resolve_counts("2468", 8) == (2, 2, 4, 4, 6, 6, 8, 8)
    assert resolve_counts("8228", 6) == (8, 8, 2, 2, 2, 8)
    assert resolve_counts("[3, 1,2]", 3) == (3, 1, 2)
    rows = [{"layer": layer, "experts": experts} for layer, experts in enumerate([1, 4, 0])]
    (tmp_path / "alpha.json").write_text(json.dumps({"layers": rows}))
    for text, message in {
        "2468": "four quarters",
        "1,2": "is for 2 layers, but the model has 3",
        "2,0,1": "layer 1 0 experts",
        "absent.json": "this is absent",
        str(tmp_path / "alpha.json"): "layer 2 0 experts",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve_counts(text, 3)
    (tmp_path / "bad.json").write_text('{"layers": [1]}')
    with pytest.raises(UserError, match="cannot be read as the --out"):
        resolve_counts(str(tmp_path / "bad.json"), 3)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"
    (tmp_path / "bad.json").write_text(pointer)
    with pytest.raises(UserError, match="git-lfs pointer"):
        resolve_counts(str(tmp_path / "bad.json"), 3)


SHAPES = CapacityShapes(layers=2, projections=7, experts=4, max_rank=6)


@pytest.mark.parametrize("kind", ["dr_lora", "random"])
def test_growth_by_the_experts_of_each_layer(kind):
    """With random statistics, also for closed experts: their budget is theirs alone."""
    section = AllocationSection(kind=kind, r_init=1, r_target=3, r_max=6, interval=5, p_grow=0.5)
    adapter = AdapterSection(kind="mola", experts_per_layer="2,4")
    policy = make_policy(TrainConfig(adapter=adapter, allocation=section), SHAPES, 40)
    assert policy.budget == (6, 12)
    state = policy.init()
    assert state.ranks_LE.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    stats = jax.tree.map(lambda leaf: abs(drawn(leaf)), policy.init_stats())
    events = [step for step in range(1, 41) if policy.is_event(step)]
    for step in events:
        before = state.ranks_LE
        state, stats, _ = policy.update(state, stats, step)
        assert (state.ranks_LE >= before).all() and not state.ranks_LE[0, 2:].any()
        stats = jax.tree.map(lambda leaf: leaf + 1, stats)
    assert len(events) > 2 and state.ranks_LE.sum(axis=1).tolist() == [6, 12]


def test_a_pattern_keeps_to_the_experts_there_are(tmp_path):
    (tmp_path / "ranks.json").write_text("[[3, 1, 0, 0], [0, 5, 2, 2]]")
    section = AllocationSection(
        kind="pattern", pattern=str(tmp_path / "ranks.json"), r_target=3, r_max=6
    )
    adapter = AdapterSection(kind="mola", experts_per_layer="2,4")
    config = TrainConfig(adapter=adapter, allocation=section)
    assert make_policy(config, SHAPES, 40).init().ranks_LE.sum() == 13
    adapter = AdapterSection(kind="mola", experts_per_layer="1,4")
    with pytest.raises(UserError, match="more experts than the 1 that adapter.experts_per_layer"):
        make_policy(dataclasses.replace(config, adapter=adapter), SHAPES, 40)


def test_what_can_not_be():
    with pytest.raises(UserError, match="has experts of its own"):
        resolve_targets(parse_config(OLMOE), "mola", ("up",))
    two = {**LLAMA, "num_hidden_layers": 2, "max_window_layers": 1}
    base = parse_config(two)
    config = dataclasses.replace(base, segments=base.segments * 2)
    with pytest.raises(UserError, match="same projections in every layer"):
        resolve_targets(config, "mola", ("q", "segment_0/.*/up"))
    with pytest.raises(UserError, match="needs a trained router"):
        TrainConfig(adapter=AdapterSection(kind="mola"), allocation=AllocationSection("moe_sieve"))
    with pytest.raises(UserError, match="without ranks are never chosen"):
        allocation = AllocationSection(r_init=0)
        TrainConfig(adapter=AdapterSection(kind="mola"), allocation=allocation)
    with pytest.raises(UserError, match="experts_per_layer=2468 is for kind=mixlora or mola"):
        AdapterSection(kind="expert_lora", experts_per_layer="2468")


# ------------------------------------------------------------------------------------- whole runs


def config_of(folder, name="run", **train):
    return tiny_config(
        folder,
        name,
        adapter=dict(
            kind="mola",
            targets=("q", "down"),
            experts_per_layer=str(folder / "alpha.json"),
        ),
        train=dict(balance_loss=1e-3, balance_form="per_layer", learning_rate=3e-2) | train,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with AlphaLoRA's experts a layer whose ranks grow twice, its folder, and its step."""
    folder = tmp_path_factory.mktemp("mola")
    (folder / "model").mkdir()
    write_tiny_model(folder / "model", TINY_LLAMA | {"num_hidden_layers": 2})
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "heldout.jsonl", 12, seed=1)
    options = ["--experts", "5", "--no-cache", "--threads", "1"]
    alpha.main([str(folder / "model"), *options, "--out", str(folder / "alpha.json")])
    run = train.build(prepare(config_of(folder)))
    compiled = train.compile_step(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_step", lambda run: compiled)
        assert train.train(run) == 0
        yield folder, run


@pytest.fixture(scope="module")
def folder(finished):
    return finished[0]


def counts_of(folder) -> list[int]:
    layers = json.loads((folder / "alpha.json").read_text())["layers"]
    return [layer["experts"] for layer in layers]


def test_growth_holds_the_budget_of_every_layer(folder):
    counts = counts_of(folder)
    assert len(set(counts)) > 1
    loaded = load_run(str(folder / "run"))
    assert loaded.ranks_LE.sum(axis=1).tolist() == [2 * n for n in counts]
    assert ((loaded.ranks_LE > 0) == (np.arange(max(counts)) < np.array(counts)[:, None])).all()
    losses = logged(folder / "run", "eval_loss")
    assert losses[-1] < losses[0] - 0.05
    stored = json.loads((folder / "run" / "config.json").read_text())
    assert stored["config"]["adapter"]["experts_per_layer"] == ",".join(map(str, counts))
    assert stored["budget"] == [2 * n for n in counts]


def test_exactly_the_routers_of_open_experts_trained(folder):
    """Of factors the policy matrix says the same."""
    loaded = load_run(str(folder / "run"))
    first = jax.jit(lambda key: init_lora(loaded.model, key))(jax.random.key(0))
    is_open_LE = loaded.ranks_LE > 0
    is_routed_LE = is_open_LE & (np.sum(is_open_LE, axis=1, keepdims=True) > 1)
    lora, before = (tree["segment_0"]["layer_0"] for tree in (loaded.variables["lora"], first))
    for module, role in (("attention", "q"), ("mlp", "down")):
        assert set(lora[module]) == {f"{role}_lora", f"{role}_router"}
        new, old = (tree[module][f"{role}_router"]["router"] for tree in (lora, before))
        moved_LDE = np.abs(np.asarray(new - old)) > 1e-6
        np.testing.assert_array_equal(moved_LDE.any(axis=1), is_routed_LE)


def test_the_loaded_model_gives_the_logged_loss_on_four_devices(finished):
    """The run had one."""
    folder, run = finished
    loaded = load_run(str(folder / "run"), mesh=MeshSection(data=2, fsdp=2))
    loss = jax.jit(lambda v, b: batch_loss(loaded.model, v, b, AuxiliaryWeights())[0].nll)
    nll = sum(float(loss(loaded.variables, each)) for each in run.job.eval_batches)
    targets = sum(float(np.sum(each.target_mask_BT)) for each in run.job.eval_batches)
    assert nll / targets == pytest.approx(logged(folder / "run", "eval_loss")[-1], rel=1e-5)


def test_a_resumed_run_is_identical(finished):
    """From the checkpoint after step 10, which was kept."""
    folder, run = finished
    shutil.copytree(folder / "run", folder / "again")
    shutil.rmtree(folder / "again" / "checkpoints" / "12")
    job = prepare(config_of(folder, "again"))
    assert not job.is_new
    assert train.train(run._replace(job=job)) == 0
    resumed, expected = (load_run(str(folder / name)) for name in ("again", "run"))
    np.testing.assert_array_equal(resumed.ranks_LE, expected.ranks_LE)
    jax.tree.map(
        np.testing.assert_array_equal, resumed.variables["lora"], expected.variables["lora"]
    )
    with pytest.raises(UserError, match="was created with adapter.experts_per_layer"):
        changed = dataclasses.replace(config_of(folder).adapter, experts_per_layer="4,4")
        prepare(dataclasses.replace(config_of(folder), adapter=changed))


def test_generates_what_the_whole_row_predicts(folder):
    loaded = load_run(str(folder / "run"), mesh=MeshSection(data=1))
    prompt = loaded.tokenizer("What is 3 plus 4?").input_ids
    [answer] = Generator(loaded, batch_size=1).generate([prompt], max_new_tokens=3)
    row = np.zeros((1, 32), np.int32)
    row[0, : len(prompt) + len(answer.tokens)] = [*prompt, *answer.tokens]
    inputs = (jnp.asarray(row), jnp.ones_like(row), jnp.arange(32)[None])
    hidden_BTD, _ = jax.jit(loaded.model.apply)(loaded.variables, *inputs)
    scores = hidden_BTD[0] @ loaded.variables["params"]["embedding"].T
    predicted = np.asarray(scores.argmax(axis=-1))[len(prompt) - 1 :]
    assert answer.tokens == predicted[: len(answer.tokens)].tolist()


def test_what_is_said_of_it(folder, capsys):
    assert inspect.main([str(folder / "run")]) == 0
    out = capsys.readouterr().out
    assert "LoRA experts, rank up to 4" in out and "/attention/q_router" in out
    with pytest.raises(
        UserError, match="lose the routing. python -m drlora_jax.convert takes mixlora only"
    ):
        arguments = ["--out", str(folder / "out"), "--format", "merged"]
        export.main(["--run", str(folder / "run"), *arguments])


def test_the_pooled_balance_loss_needs_layers_alike(folder):
    with pytest.raises(UserError, match="set train.balance_form=per_layer"):
        prepare(config_of(folder, "other", balance_form="pooled"))
