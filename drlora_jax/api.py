"""The public API: what `import drlora_jax as dj` offers.

Everything else in the package may change without notice. `drlora_jax` imports this module at the
first use of one of its names. Arguments with the wrong rank, shape or dtype raise AssertionError
(from chex) before anything is computed; everything that a user can fix, from a missing file to a
setting out of range, raises `drlora_jax.errors.UserError` with one sentence on what to do.

Letters: B rows, T tokens, V vocabulary, L layers with experts, E experts, R allocated ranks.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from drlora_jax import export as export_command
from drlora_jax.allocation import (
    CapacityShapes,
    CapacityState,
    Event,
    Policy,
)
from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    MeshSection,
    TrainConfig,
    load_config,
)
from drlora_jax.config.resolve import (
    capacity_shapes,
    make_adapter,
    make_policy,
    with_resolved_experts,
    with_resolved_rank,
)
from drlora_jax.data.wording import Writer
from drlora_jax.errors import UserError
from drlora_jax.inference import model as inference
from drlora_jax.inference.generation import Generator, Sampling
from drlora_jax.inference.words import of_run
from drlora_jax.interop.hf_files import find_model
from drlora_jax.models import transformer
from drlora_jax.models.placement import Placement
from drlora_jax.models.transformer import Decoder
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes
from drlora_jax.runs.source import find_run
from drlora_jax.training.job import Job, prepare
from drlora_jax.training.step import init_lora

__all__ = [
    "CapacityShapes",
    "CapacityState",
    "Event",
    "Job",
    "Placement",
    "Policy",
    "TrainedModel",
    "attach",
    "load_config",
    "load_model",
    "load_run",
    "logits",
    "prepare",
]
MANY_STEPS = 10**9  # of the schedule that `attach` assumes: time for every event


def load_model(
    path: str, dtype: str | None = None, mesh: Mapping[str, int] | None = None
) -> tuple[Decoder, dict]:
    """Loads a base model, strictly: every tensor of the directory is accounted for.

    Args:
      path: A Hugging Face model directory, a hub name, or `bundled:tiny_moe`.
      dtype: The dtype of weights and activations, `float32` or `bfloat16`. None: bfloat16 on
        accelerators and float32 on CPUs. Routers, norms and softmax are always float32.
      mesh: The sizes of the mesh axes `data`, `fsdp`, `expert` and `tensor`, such as
        `{"expert": 8}`; an axis that is not named has size 1. None: the first device alone.

    Returns:
      The model, a `flax.linen` module whose architecture is `model.config`, and its parameters, a
      nested dict of arrays in `dtype`, placed on the mesh.

    Raises:
      UserError: If there is no such model, its architecture is not supported, a tensor is missing,
        unknown or has another shape, or the mesh does not fit the devices or the model.
    """
    base = inference.place_base(find_model(path), dtype or "auto", _mesh_section(mesh))
    return base.model, base.params


def logits(
    model: Decoder,
    params: dict,
    tokens_BT: ArrayLike,
    segment_ids_BT: ArrayLike | None = None,
    positions_BT: ArrayLike | None = None,
    *,
    adapter: dict | None = None,
) -> jax.Array:
    """Computes next-token logits; compiled once per shape, differentiable in all float inputs.

    Args:
      model: From `load_model` or `attach`.
      params: The base model's parameters.
      tokens_BT: Integer token ids [B, T].
      segment_ids_BT: Integer [B, T]: tokens attend within their own segment, 0 is padding. None:
        every row is one text without padding.
      positions_BT: Integer [B, T], the position of each token in its own text. None: 0 to T - 1.
      adapter: The collections that `attach` returned; needed for a model with adapters.

    Returns:
      f32 [B, T, V]. On a mesh B must be a multiple of data x fsdp x expert.

    Raises:
      AssertionError: If the arrays are not integers of one shape [B, T].
    """
    batch = _checked_batch(tokens_BT, segment_ids_BT, positions_BT)
    return _logits(model, {"params": params} | (adapter or {}), *batch)


def attach(
    model: Decoder,
    adapter: AdapterSection | Mapping[str, Any],
    allocation: AllocationSection | Mapping[str, Any],
    *,
    key: jax.Array | None = None,
) -> tuple[Decoder, dict]:
    """Attaches fresh adapters to a base model; its function does not change until they are trained.

    Args:
      model: From `load_model`.
      adapter: The config section `adapter`, or its fields that differ from the defaults.
      allocation: The config section `allocation`, or its fields. It gives the ranks before step 1.
      key: The random key of the A matrices; None: `jax.random.key(0)`.

    Returns:
      The model with adapters, and the collections that it reads beside `params`: `lora`, the
      trained matrices (f32, experts at their allocated rank R), and `rank_mask`, 1 for an active
      rank and 0 for an inactive one, whose gradients and updates are exactly zero.

    Raises:
      UserError: If adapter and allocation contradict each other or the model, or if the first ranks
        are measured on data or on weights on disk; `prepare` measures them.
    """
    config = TrainConfig(
        adapter=_section(AdapterSection, adapter),
        allocation=_section(AllocationSection, allocation),
    )
    config = with_resolved_experts(config, model.config.num_layers)
    config = with_resolved_rank(config, model.config)
    placement = make_adapter(config, model.config)
    adapted = model.clone(options=dataclasses.replace(model.options, adapter=placement))
    ranks_LE = _first_ranks(config, capacity_shapes(model.config, placement))
    lora = jax.jit(init_lora, static_argnums=0)(adapted, jax.random.key(0) if key is None else key)
    chex.assert_trees_all_equal_shapes_and_dtypes(lora, transformer.abstract_lora(adapted))
    return adapted, {"lora": lora, "rank_mask": inference.rank_gates(adapted, ranks_LE)}


class TrainedModel:
    """A run's model at a checkpoint: the base model with its adapter. Made by `load_run`.

    Attributes:
      model: The adapted decoder; `model.config` is its architecture.
      params: The base model's parameters.
      adapter: The collections `lora` and `rank_mask`, as `logits` takes them.
      tokenizer: The tokenizer of the base model, with the chat template of the training.
      config: The run's resolved `TrainConfig`.
      step: The optimizer step of the checkpoint.
      ranks_LE: i32 [L, E], the active ranks of every layer's experts.
    """

    def __init__(self, loaded: inference.Loaded, words):
        self._loaded, self._words, self._generator = loaded, words, None
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.params = loaded.variables["params"]
        self.adapter = {k: v for k, v in loaded.variables.items() if k != "params"}
        self.config, self.step, self.ranks_LE = loaded.config, loaded.step, loaded.ranks_LE

    def logits(
        self,
        tokens_BT: ArrayLike,
        segment_ids_BT: ArrayLike | None = None,
        positions_BT: ArrayLike | None = None,
    ) -> jax.Array:
        """Computes next-token logits f32 [B, T, V]; arguments are those of `drlora_jax.logits`.

        On a mesh, rows are padded to what divides among its devices.
        """
        batch = _checked_batch(tokens_BT, segment_ids_BT, positions_BT)
        rows, mesh = len(batch[0]), self._loaded.mesh
        padding = ((0, mesh_lib.whole_shards(mesh, rows) - rows), (0, 0))
        padded = tuple(np.pad(np.asarray(each), padding) for each in batch)
        placed = processes.place(padded, mesh_lib.rows(mesh))
        return _logits(self.model, self._loaded.variables, *placed)[:rows]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
        system: str | None = None,
        seed: int = 0,
    ) -> str | list[str]:
        """Answers prompts, written as the run's training rows were: same template, same date.

        Args:
          prompts: One text, or several; each answer is independent of the other prompts.
          max_new_tokens: An answer ends there, at an end token, or at a stop string.
          temperature: 0 takes the most likely token always.
          top_k: Draws from the k most likely tokens only.
          top_p: Draws from the smallest set of tokens with this probability only.
          stop: Strings that end an answer; they are not part of it.
          system: A system message in front of every prompt.
          seed: The seed of the random draws.

        Returns:
          The answer of a single text, or one per prompt.

        Raises:
          UserError: For settings out of range, or a prompt that the template cannot write.
        """
        writer = Writer(self._words.wording(), self.tokenizer)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self._generator is None:
            self._generator = Generator(self._loaded)
        answers = self._generator.generate(
            [writer.question(text, system=system).ids for text in texts],
            max_new_tokens=max_new_tokens,
            stop=tuple(stop),
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
        )
        found = [answer.text for answer in answers]
        return found[0] if isinstance(prompts, str) else found

    def export(
        self, out: str | os.PathLike, format: str = "peft", *, dtype: str | None = None
    ) -> None:
        """Writes the model for other programs, and keeps the files only if they compute the same.

        Args:
          out: A new or empty directory.
          format: `peft` (experts fused, as transformers 5 holds them), `peft-2d` (one pair per
            expert, for servers that stack experts), or `merged` (a full model directory).
          dtype: The dtype of all tensors. None: float32 for adapters, the base model's own dtypes
            for `merged`.

        Raises:
          UserError: If the directory is in use, or the placement has no such form.
          RunError: If what was written does not give the run's logits; nothing is left behind.
        """
        export_command.export(
            export_command.Request(
                run=str(self._loaded.run_dir),
                out=os.fspath(out),
                format=format,
                step=str(self.step),
                model_path=str(self._loaded.directory),
                dtype=dtype,
            )
        )


def load_run(
    run_dir: str | os.PathLike,
    step: int | str = "latest",
    *,
    model_path: str | None = None,
    dtype: str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> TrainedModel:
    """Loads a trained model; nothing in the run directory is executed or changed.

    Args:
      run_dir: The training's `run.dir`.
      step: `latest`, `best` (smallest held-out loss), or the number of a step that was kept. A
        damaged checkpoint is passed over for the one before.
      model_path: Where the base model is now, if it has moved; its fingerprint is checked.
      dtype: The dtype of base weights and activations; None: the run's.
      mesh: As for `load_model`; a checkpoint restores on any mesh.

    Raises:
      UserError: If there is no such run, checkpoint or base model, or the base model is another.
    """
    words = of_run(find_run(os.fspath(run_dir), step=str(step), model_path=model_path))
    loaded = inference.load_run(
        os.fspath(run_dir), dtype=dtype, mesh=_mesh_section(mesh), words=words
    )
    return TrainedModel(loaded, words)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Decoder, variables: dict, tokens_BT, segment_ids_BT, positions_BT):
    hidden_BTD, _ = model.apply(variables, tokens_BT, segment_ids_BT, positions_BT)
    return transformer.logits(model.config, variables["params"], hidden_BTD)


def _checked_batch(tokens_BT, segment_ids_BT, positions_BT) -> tuple[Any, Any, Any]:
    tokens_BT = jnp.asarray(tokens_BT)
    chex.assert_rank(tokens_BT, 2)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    batch = (tokens_BT, jnp.asarray(segment_ids_BT), jnp.asarray(positions_BT))
    chex.assert_type(batch, int)
    chex.assert_equal_shape(batch)
    return batch


def _section(cls: type, given):
    return cls(**given) if isinstance(given, Mapping) else given


def _mesh_section(mesh: Mapping[str, int] | None) -> MeshSection:
    return MeshSection(**{"data": 1} | dict(mesh or {}))


def _first_ranks(config: TrainConfig, shapes: CapacityShapes) -> np.ndarray:
    """Returns the ranks before step 1, i32 [L, E], of a run with time for every event."""
    section = config.allocation
    measured = "exponents of the weights" if section.own.wants_exponents() else None
    policy = None if measured else make_policy(config, shapes, MANY_STEPS)
    if measured is None and policy.profile:
        measured = "rows of training data"
    if measured:
        raise UserError(
            f"allocation.kind={section.kind} takes its first ranks from {measured}, which attach "
            "does not read: use prepare(config) and train(job), or another kind."
        )
    return policy.init().ranks_LE
