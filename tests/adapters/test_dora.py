"""DoRA on plain LoRA: its formula and gradients, what peft makes of an export, and a short run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from drlora_jax import export, train
from drlora_jax.adapters.lora import Lora
from drlora_jax.adapters.targets import coverage
from drlora_jax.config import AdapterSection
from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.errors import UserError
from drlora_jax.inference.model import load_run
from drlora_jax.interop import peft_write
from drlora_jax.interop.export_check import Trained, judge, measure, trained_variant
from drlora_jax.interop.hf_read import load_model
from drlora_jax.interop.layer_reader import LayerReader
from drlora_jax.interop.lora_tables import layer_updates
from drlora_jax.interop.verify import make_prompts, run_variants
from drlora_jax.models.layers import Projection
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, logits
from drlora_jax.training.job import prepare
from drlora_jax.training.step import init_lora
from tests.support.tiny import TINY_LLAMA, tiny_config, write_rows, write_tiny_model
from tests.support.trained_models import MODELS, SCALE, make_trained, random_factors

TARGETS = ("gate", "down", "q", "v")


# ------------------------------------------------------------------------------------ one matrix

SEGMENTS_BT = np.ones((2, 4), np.int32)


def make_projection(size: float):
    """A module, inputs, and variables with updates of that size."""
    adapter = Lora(frozenset({"here"}), scale=SCALE, rank=3, dora=True)
    module = Projection(5, DecoderOptions(adapter=adapter), has_bias=True, name="here")
    draw = np.random.default_rng(0)
    x_BTD = draw.normal(size=(2, 4, 6)).astype("f4")
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_BTD, SEGMENTS_BT)
    variables = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype("f4"), shapes)
    for name in ("b", "magnitude_delta"):
        variables["lora"]["lora"][name] *= np.float32(size)
    return module, x_BTD, variables


def test_equals_its_formula_and_gradients():
    module, x_BTD, variables = make_projection(0.3)
    params, lora = variables["params"], variables["lora"]
    weights_BTF = np.random.default_rng(1).normal(size=(2, 4, 5)).astype("f4")

    def ours(lora, x_BTD):
        y_BTF, _ = module.apply({"params": params, "lora": lora}, x_BTD, SEGMENTS_BT)
        return jnp.sum(weights_BTF * y_BTF)

    def formula(lora, x_BTD):
        """With the adapted matrix and its norms written out, the norms as constants."""
        pair, kernel_DF = lora["lora"], params["kernel"]
        merged_DF = kernel_DF + SCALE * pair["a"].T @ pair["b"]
        norm_F = jax.lax.stop_gradient(jnp.linalg.norm(merged_DF, axis=0))
        magnitude_F = jnp.linalg.norm(kernel_DF, axis=0) + pair["magnitude_delta"]
        y_BTF = x_BTD @ (merged_DF * (magnitude_F / norm_F)[None]) + params["bias"][None, None]
        return jnp.sum(weights_BTF * y_BTF)

    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(lora, x_BTD) for f in (ours, formula))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for ours_, theirs in pairs:
        assert float(np.abs(ours_ - theirs).max()) <= 1e-5 * float(np.abs(theirs).max())


def test_starts_as_its_base():
    module, x_BTD, variables = make_projection(0.0)
    params = variables["params"]
    params["kernel"][:, 2] = 0.0  # a column without a direction
    y_BTF, _ = jax.jit(module.apply)(variables, x_BTD, SEGMENTS_BT)
    plain = x_BTD @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(y_BTF, plain, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("dora") / "base", MODELS["llama"])


@pytest.fixture(scope="module")
def trained(base) -> Trained:
    """Random factors and magnitudes on a tiny LLaMA."""
    plain = make_trained(base, TARGETS)
    adapter = dataclasses.replace(plain.adapter, dora=True)
    model = Decoder(plain.config, DecoderOptions(adapter=adapter))
    no_ranks = np.zeros((0, 0), np.int32)
    shapes = jax.eval_shape(lambda: init_lora(model, jax.random.key(0)))
    lora = random_factors(shapes, 0.2, no_ranks)
    factors = layer_updates(plain.config, adapter, lora, no_ranks)
    assert all(set(layer.magnitudes) == set(layer.plain) for layer in factors)
    return Trained(plain.config, adapter, lora, {}, factors)


def write(trained: Trained, base, target, layout, dtype=None):
    target.mkdir()
    reader = LayerReader(trained.config, base)
    if layout == export.MERGED:
        export.write_merged(target, base, trained, reader, dtype, None)
    else:
        adapter = export.make_adapter(trained, reader, layout, dtype)
        peft_write.write(target, adapter, str(base), {})
    return target


@pytest.mark.parametrize(
    ("layout", "dtype"), [("peft", None), ("merged", None), ("peft", "bfloat16")]
)
def test_exports_compute_what_was_trained(tmp_path, base, trained, layout, dtype):
    target = write(trained, base, tmp_path / "out", layout, dtype)
    prompts = make_prompts(load_tokenizer(base), trained.config.vocab_size)[1:3]
    reader = LayerReader(trained.config, base)
    options = dict(is_merged=layout == export.MERGED, dtype=dtype)
    judge(measure(trained, reader, target, prompts, **options))
    # Lost magnitudes would be seen.
    blind = trained._replace(updates=[f._replace(magnitudes={}) for f in trained.updates])
    target = write(blind, base, tmp_path / "blind", layout, dtype)
    assert measure(trained, reader, target, prompts, **options).kl > 1e-4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_logits_and_gradients_are_those_of_peft(tmp_path, base, trained):
    torch = pytest.importorskip("torch", reason="peft itself is what is compared with")
    pytest.importorskip("peft", reason="peft itself is what is compared with")
    from peft import PeftModel

    from tests.oracles import load_export

    target = write(trained, base, tmp_path / "peft", "peft")
    prompts = make_prompts(load_tokenizer(base), trained.config.vocab_size)[1:2]
    variants = {"adapted": trained_variant(trained, LayerReader(trained.config, base))}
    expected = run_variants(trained.config, variants, prompts)["adapted"].logits
    for name, model in load_export.load_models(base, target, "peft"):
        assert load_export.largest_kl(model, prompts, expected) <= 1e-5, name

    model = PeftModel.from_pretrained(load_export.load_model(base), target, is_trainable=True)
    assert model.peft_config["default"].use_dora
    tokens = torch.tensor(prompts[0][None]).long()
    theirs = model(tokens, use_cache=False).logits[0]
    torch.sum(torch.log_softmax(theirs, dim=-1)[:, 7]).backward()
    _, params = load_model(str(base))
    ours = Decoder(trained.config, DecoderOptions(adapter=trained.adapter))
    inputs = (prompts[0][None], np.ones_like(prompts[0])[None], np.arange(prompts[0].size)[None])

    def score(lora):
        hidden_BTD, _ = ours.apply({"params": params, "lora": lora}, *inputs)
        return jnp.sum(jax.nn.log_softmax(logits(trained.config, params, hidden_BTD))[..., 7])

    grads = jax.jit(jax.grad(score))(trained.lora)["segment_0"]["layer_0"]
    found = {
        name: value.grad.numpy()
        for name, value in model.named_parameters()
        if value.grad is not None
    }
    assert len(found) == 3 * len(TARGETS) * trained.config.num_layers
    for name, theirs in found.items():
        parts = name.split(".")
        layer, role = int(parts[parts.index("layers") + 1]), parts[parts.index("layers") + 3][0]
        role = {"g": "gate", "d": "down"}.get(role, role)
        module = "attention" if role in "qv" else "mlp"
        leaf = {"lora_A": "a", "lora_B": "b"}.get(parts[-3], "magnitude_delta")
        got = np.asarray(grads[module][role]["lora"][leaf][layer])
        got = got.T / SCALE if leaf == "b" else got  # the export's B has the scale in it
        assert np.linalg.norm(got - theirs) <= 1e-4 * np.linalg.norm(theirs), name


# ------------------------------------------------------------------------------------ a whole run


def test_a_run_trains_magnitudes_and_exports_them(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model", TINY_LLAMA)
    write_rows(tmp_path / "train.jsonl", 20)
    config = tiny_config(
        tmp_path,
        data=dict(eval_path=()),
        adapter=dict(kind="lora", targets=("q", "up"), dora=True),
        allocation=dict(kind="uniform"),
        train=dict(steps=3),
    )
    run = train.build(prepare(config))
    assert train.train(run) == 0
    loaded = load_run(str(tmp_path / "run"))
    lora = loaded.variables["lora"]["segment_0"]["layer_0"]
    pairs = [lora["attention"]["q"]["lora"], lora["mlp"]["up"]["lora"]]
    assert all(np.asarray(pair["magnitude_delta"]).all() for pair in pairs)
    rows = coverage(run.job.model_config, run.job.adapter, config.adapter.targets)
    trained = sum(leaf.size for leaf in jax.tree.leaves(loaded.variables["lora"]))
    assert sum(row.trained for row in rows) == trained
    out = tmp_path / "adapter"
    monkeypatch.setattr(export, "check_opened", lambda made: [])  # test_opened.py is about that
    assert export.main(["--run", str(tmp_path / "run"), "--format", "peft", "--out", str(out)]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"]
    tensors = load_file(out / "adapter_model.safetensors")
    names = [name for name in tensors if name.endswith(".lora_magnitude_vector")]
    assert len(names) == 2 * 3


@pytest.mark.parametrize("kind", ["expert_lora", "mixlora", "mola"])
def test_experts_refuse_it(kind):
    with pytest.raises(UserError, match=f"dora=True is for kind=lora, got kind={kind}"):
        AdapterSection(kind=kind, dora=True)
