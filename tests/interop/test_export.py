"""Exports as files: what they hold, what they leave alone, and that a wrong one is not kept."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from drlora_jax import export
from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.errors import RunError
from drlora_jax.interop import peft_write
from drlora_jax.interop.export_check import (
    MAX_KL,
    Measured,
    Trained,
    judge,
    measure,
    trained_variant,
)
from drlora_jax.interop.hf_files import read_headers
from drlora_jax.interop.hf_read import load_model
from drlora_jax.interop.hf_write import rewrite_model
from drlora_jax.interop.layer_reader import LayerReader
from drlora_jax.interop.lora_tables import Pair, layer_updates
from drlora_jax.interop.verify import make_prompts, run_variants
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, logits
from tests.support.tiny import write_tiny_model
from tests.support.trained_models import MAX_RANK, MODELS, PLAIN_RANK, RANKS_LE, SCALE, make_trained

WRONG = "does not compute what was trained"


class Base:
    """A tiny base, and exports of adapters of it."""

    def __init__(self, folder: pathlib.Path, family: str):
        self.folder = folder
        self.directory = write_tiny_model(folder / "base", MODELS[family])
        tokenizer = load_tokenizer(self.directory)
        self.prompts = make_prompts(tokenizer, MODELS[family]["vocab_size"])[1:4]

    def export(self, trained: Trained, layout: str, dtype: str | None = None) -> pathlib.Path:
        target = self.folder / f"{layout}-{len(list(self.folder.iterdir()))}"
        target.mkdir()
        reader = LayerReader(trained.config, self.directory)
        if layout == export.MERGED:
            export.write_merged(target, self.directory, trained, reader, dtype, None)
        else:
            adapter = export.make_adapter(trained, reader, layout, dtype)
            peft_write.write(target, adapter, str(self.directory), {})
        return target

    def measure(self, trained: Trained, target: pathlib.Path, layout, dtype=None) -> Measured:
        reader = LayerReader(trained.config, self.directory)
        is_merged = layout == export.MERGED
        return measure(trained, reader, target, self.prompts, is_merged=is_merged, dtype=dtype)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("olmoe"), "olmoe")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module")
def trained(olmoe):
    """Every kind of factor there is."""
    return make_trained(olmoe.directory, ("gate", "up", "down", "q", "v"), has_router=True)


# ---------------------------------------------------------------------------------------------
# the function


@pytest.mark.parametrize("layout", export.FORMATS)
def test_exports_compute_what_was_trained(olmoe, trained, layout):
    measured = olmoe.measure(trained, olmoe.export(trained, layout), layout)
    judge(measured)
    assert measured.exported.kl <= MAX_KL and measured.exported.counted == len(olmoe.prompts)
    assert measured.adapter_change > 0.1


@pytest.mark.parametrize("layout", export.FORMATS)
def test_a_fused_role_alone(mixtral, layout):
    trained = make_trained(mixtral.directory, ("gate_up", "k"))
    judge(mixtral.measure(trained, mixtral.export(trained, layout), layout))


@pytest.mark.parametrize("layout", export.FORMATS)
def test_dense_models(tmp_path, layout):
    base = Base(tmp_path, "llama")
    trained = make_trained(base.directory, ("gate", "down", "q", "v"))
    judge(base.measure(trained, base.export(trained, layout), layout))


def test_streamed_layers_are_the_model(olmoe, trained):
    """Block by block gives the logits of the whole decoder."""
    reader = LayerReader(trained.config, olmoe.directory)
    variants = {"adapted": trained_variant(trained, reader)}
    outputs = run_variants(trained.config, variants, olmoe.prompts)["adapted"]
    _, params = load_model(str(olmoe.directory))
    model = Decoder(trained.config, DecoderOptions(adapter=trained.adapter))
    variables = {"params": params, "lora": trained.lora, "rank_mask": trained.gates}
    ids, streamed = olmoe.prompts[0], outputs.logits[0]
    tokens_BT, positions_BT = jnp.asarray(ids)[None], jnp.arange(ids.size)[None]
    hidden, _ = jax.jit(model.apply)(variables, tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
    np.testing.assert_allclose(logits(trained.config, params, hidden)[0], streamed, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# the adapter's arrays


def expected_delta(trained: Trained, layer: int, role: str, expert: int) -> np.ndarray:
    """[D_out, D_in] of one expert, summed rank by rank over the active ones."""
    factors = trained.lora["segment_0"]["layer_0"]["moe"][f"{role}_lora"]
    a, b = (factors[name][layer, expert].astype(np.float64) for name in "ab")
    total = np.zeros((b.shape[1], a.shape[1]))
    for rank in range(RANKS_LE[layer, expert]):
        total += SCALE * np.outer(b[rank], a[rank])
    return total


def test_fused_layout_by_loops(olmoe, trained):
    target = olmoe.export(trained, "peft")
    config = json.loads((target / "adapter_config.json").read_text())
    tensors = load_file(target / "adapter_model.safetensors")
    rank = 2 * MAX_RANK  # of gate and up below each other
    assert config["r"] == config["lora_alpha"] == rank
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert config["modules_to_save"] == ["mlp.gate"]
    for layer in range(2):
        experts = f"base_model.model.model.layers.{layer}.mlp.experts"
        for name, roles in (("base_layer.lora", ("gate", "up")), ("lora", ("down",))):
            a, b = (tensors[f"{experts}.{name}_{side}.weight"] for side in "AB")
            for expert in range(5):
                got = sum(np.outer(b[:, k * 5 + expert], a[expert * rank + k]) for k in range(rank))
                want = [expected_delta(trained, layer, role, expert) for role in roles]
                np.testing.assert_allclose(got, np.concatenate(want), atol=1e-5)


def test_expert_layout_by_loops(mixtral):
    trained = make_trained(mixtral.directory, ("up", "down", "q"))
    target = mixtral.export(trained, "peft-2d")
    config = json.loads((target / "adapter_config.json").read_text())
    tensors = load_file(target / "adapter_model.safetensors")
    assert config["target_modules"] == ["q_proj", "w1", "w2", "w3"]
    assert config["r"] == config["lora_alpha"] == MAX_RANK
    names = {"w1": None, "w3": "up", "w2": "down"}
    for layer, expert, name in np.ndindex(2, 5, 3):
        leaf, role = list(names.items())[name]
        experts = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts"
        a, b = (tensors.pop(f"{experts}.{expert}.{leaf}.lora_{side}.weight") for side in "AB")
        assert a.shape[0] == b.shape[1] == MAX_RANK  # one rank for all, or readers can not stack
        want = 0 if role is None else expected_delta(trained, layer, role, expert)
        np.testing.assert_allclose(b @ a, want, atol=1e-5)
    assert sorted(tensors) == [
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
        for layer in range(2)
        for side in "AB"
    ]
    assert not np.any(tensors[next(iter(sorted(tensors)))][PLAIN_RANK:])


def test_targets_are_named_in_full_where_short_names_would_match_more(olmoe):
    trained = make_trained(olmoe.directory, ("down", "q"))
    one = trained.updates[1]._replace(plain={}, experts={})
    adapter = peft_write.pack(trained.config, [trained.updates[0], one], {}, "peft")
    assert adapter.modules == ["model.layers.0.self_attn.q_proj"]
    assert adapter.parameters == ["model.layers.0.mlp.experts.down_proj"]


# ---------------------------------------------------------------------------------------------
# wrong exports


def expert_slowest(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b.T if b.ndim == 2 else b.transpose(2, 0, 1).reshape(len(b.T), -1))


def transposed(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a.swapaxes(-1, -2).reshape(-1, a.shape[-1]))


def swap_halves(experts: dict[str, Pair]) -> dict[str, Pair]:
    return experts | {"gate": experts["up"], "up": experts["gate"]}


def without_scale(trained: Trained) -> Trained:
    """What an exporter would see that forgot the scale."""
    adapter = trained.adapter.__class__(**(vars(trained.adapter) | {"scale": 1.0}))
    factors = layer_updates(trained.config, adapter, trained.lora, RANKS_LE)
    return trained._replace(updates=factors)


def swapped(trained: Trained) -> Trained:
    factors = [f._replace(experts=swap_halves(f.experts)) for f in trained.updates]
    return trained._replace(updates=factors)


@pytest.mark.parametrize("mistake", ["expert slowest", "transposed", "no scale", "gate for up"])
def test_wrong_packings_are_refused(olmoe, trained, monkeypatch, mistake):
    wrong = trained
    if mistake == "expert slowest":
        monkeypatch.setattr(peft_write, "pack_b", expert_slowest)
    elif mistake == "transposed":
        monkeypatch.setattr(peft_write, "pack_a", transposed)
    else:
        wrong = {"no scale": without_scale, "gate for up": swapped}[mistake](trained)
    measured = olmoe.measure(trained, olmoe.export(wrong, "peft"), "peft")
    print(f"{mistake}: KL {measured.kl:.1e}")
    assert measured.kl >= 100 * MAX_KL
    with pytest.raises(RunError, match=WRONG):
        judge(measured)


@pytest.mark.parametrize("mistake", [without_scale, swapped])
def test_wrong_merges_are_refused(olmoe, trained, mistake):
    for dtype in (None, "bfloat16"):
        wrong = mistake(trained)
        target = olmoe.export(wrong, "merged", dtype)
        # The check shares the mistake where it adds factors itself: only `adapted` is right.
        measured = olmoe.measure(wrong, target, "merged", dtype)
        assert measured.kl >= 100 * MAX_KL
        with pytest.raises(RunError, match=WRONG):
            judge(measured)


def test_an_adapter_without_effect_is_refused(olmoe):
    trained = make_trained(olmoe.directory, ("down",), size=0.0)
    with pytest.raises(RunError, match="the adapter changes nothing"):
        judge(olmoe.measure(trained, olmoe.export(trained, "peft"), "peft"))


def test_an_update_that_rounding_loses_is_refused(olmoe, tmp_path):
    base = write_tiny_model(tmp_path / "base", MODELS["olmoe"])
    tensors = load_file(base / "model.safetensors")
    for key, value in tensors.items():
        if key.endswith("down_proj.weight"):  # none so small that the update moves it
            value[...] = np.copysign(np.maximum(np.abs(value), 0.1), value)
    save_file(tensors, base / "model.safetensors")
    base = bfloat16_copy(base, tmp_path / "bfloat16")
    trained = make_trained(base, ("down",), size=1e-5)
    reader = merge(base, tmp_path / "merged", trained)
    target = tmp_path / "merged"
    measured = measure(trained, reader, target, olmoe.prompts, is_merged=True, dtype=None)
    with pytest.raises(RunError, match="rounding loses the update"):
        judge(measured)


# ---------------------------------------------------------------------------------------------
# merged directories


def bfloat16_copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    target.mkdir()
    rewrite_model(source, target, (), lambda key, value: value, dtype="bfloat16")
    return target


def fused_copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """The same OLMoE with one tensor for all experts of a layer."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"

        def take(role, prefix=prefix):
            return np.stack([tensors.pop(f"{prefix}.{e}.{role}_proj.weight") for e in range(5)])

        gate_up = np.concatenate([take("gate"), take("up")], axis=1)
        tensors[f"{prefix}.gate_up_proj"] = gate_up
        tensors[f"{prefix}.down_proj"] = take("down")
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def merge(base: pathlib.Path, target: pathlib.Path, trained: Trained, dtype=None, limit=None):
    target.mkdir()
    reader = LayerReader(trained.config, base)
    export.write_merged(target, base, trained, reader, dtype, limit)
    return reader


def all_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    return {
        key: value
        for file in directory.glob("*.safetensors")
        for key, value in load_file(file).items()
    }


def test_merging_changes_adapted_tensors_only(olmoe, tmp_path):
    trained = make_trained(olmoe.directory, ("up", "v"))
    merge(olmoe.directory, tmp_path / "merged", trained)
    before, after = all_tensors(olmoe.directory), all_tensors(tmp_path / "merged")
    assert list(before) == list(after)
    changed = {key for key in before if before[key].tobytes() != after[key].tobytes()}
    active = [(layer, e) for layer in range(2) for e in range(5) if RANKS_LE[layer, e]]
    expected = {f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for layer, e in active}
    assert changed == expected | {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)}
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    want = before[key] + expected_delta(trained, 1, "up", 3)
    np.testing.assert_allclose(after[key], want, atol=1e-6)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copied = (tmp_path / "merged" / name).read_bytes()
        assert copied == (olmoe.directory / name).read_bytes()


def test_a_fused_base_stays_fused(olmoe, trained, tmp_path):
    base = fused_copy(olmoe.directory, tmp_path / "fused")
    reader = merge(base, tmp_path / "merged", trained)
    assert list(all_tensors(base)) == list(all_tensors(tmp_path / "merged"))
    judge(measure(trained, reader, tmp_path / "merged", olmoe.prompts, is_merged=True, dtype=None))


def test_a_bfloat16_base_is_rounded_once(olmoe, trained, tmp_path):
    base = bfloat16_copy(olmoe.directory, tmp_path / "bfloat16")
    reader = merge(base, tmp_path / "merged", trained)
    key = "model.layers.0.mlp.experts.1.down_proj.weight"
    value = all_tensors(base)[key].astype(np.float64) + expected_delta(trained, 0, "down", 1)
    got = all_tensors(tmp_path / "merged")[key]
    assert got.dtype == ml_dtypes.bfloat16
    # Half a unit in the last place at most; rounding the update first would be off by more.
    assert np.all(np.abs(got.astype(np.float64) - value) <= np.abs(value) * 2**-8 + 1e-6)
    assert np.mean(got == value.astype(ml_dtypes.bfloat16)) > 0.99
    target = tmp_path / "merged"
    measured = measure(trained, reader, target, olmoe.prompts, is_merged=True, dtype=None)
    judge(measured)
    assert measured.merged.kl <= MAX_KL < measured.kl  # rounding shows, and is told apart


def test_shards_of_the_base_are_kept_and_others_can_be_cut(olmoe, trained, tmp_path):
    limit = 150_000
    sharded = tmp_path / "sharded"
    merge(olmoe.directory, sharded, trained._replace(updates=[]), limit=limit)
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:  # one tensor may be larger, alone in its file
        tensors = load_file(sharded / file)
        assert sum(value.nbytes for value in tensors.values()) <= limit or len(tensors) == 1
    before, after = all_tensors(olmoe.directory), all_tensors(sharded)
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}

    only_q = make_trained(olmoe.directory, ("q", "down"))
    merge(sharded, tmp_path / "merged", only_q)
    index = "model.safetensors.index.json"
    indices = [json.loads((d / index).read_text()) for d in (sharded, tmp_path / "merged")]
    assert indices[0] == indices[1]
    assert indices[0]["metadata"]["total_size"] == sum(v.nbytes for v in before.values())
    assert len(read_headers(tmp_path / "merged")) == len(before)
    same = {
        f for f in files if (sharded / f).read_bytes() == (tmp_path / "merged" / f).read_bytes()
    }
    assert same and same != set(files)  # the embedding's shard has nothing adapted
