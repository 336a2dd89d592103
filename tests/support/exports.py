"""Exports of tiny models, for tests of what reads them."""

import pathlib

from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.export import FORMATS, MERGED, make_adapter, write_merged
from drlora_jax.interop import peft_write
from drlora_jax.interop.export_check import trained_variant
from drlora_jax.interop.hf_write import rewrite_model
from drlora_jax.interop.layer_reader import LayerReader
from drlora_jax.interop.verify import make_prompts, run_variants
from tests.support.tiny import write_tiny_model
from tests.support.trained_models import MODELS, make_trained


def export(folder: pathlib.Path, family: str, targets: tuple[str, ...], *, has_router=False):
    """The base, every format of it by name, prompts, and the logits that they must give."""
    base = write_tiny_model(folder / "base", MODELS[family])
    trained = make_trained(base, targets, has_router=has_router)
    reader = LayerReader(trained.config, base)
    for layout in FORMATS:
        target = folder / layout
        target.mkdir()
        if layout == MERGED:
            write_merged(target, base, trained, reader, None, None, (0,))
        else:
            peft_write.write(target, make_adapter(trained, reader, layout, None), str(base), {})
    prompts = make_prompts(load_tokenizer(base), trained.config.vocab_size)[1:4]
    variants = {"adapted": trained_variant(trained, reader)}
    return base, prompts, run_variants(trained.config, variants, prompts)["adapted"].logits


def rewrite(base: pathlib.Path, name="out", **options) -> tuple[pathlib.Path, list[str]]:
    target = base.parent / name
    target.mkdir()
    return target, rewrite_model(base, target, (), lambda key, value: value, **options)
