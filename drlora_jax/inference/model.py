"""Loads a model for evaluation, generation and export: a run's base model with its adapter at a
checkpoint, or a base model alone.

Only LoRA matrices and ranks are read from a checkpoint, never the optimizer's state, and they are
placed on the present mesh. Nothing in the run directory is executed or changed.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from drlora_jax.adapters.rank_trees import masks_tree, rank_axes
from drlora_jax.allocation import masks_from_ranks
from drlora_jax.config import MeshSection, TrainConfig
from drlora_jax.data.tokenize import check_vocabulary
from drlora_jax.inference.words import Words, of_base, of_run
from drlora_jax.interop.hf_files import find_model, fingerprint, read_headers, read_model_config
from drlora_jax.interop.hf_read import load_params, match_keys
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.placement import NO_ADAPTER, Placement
from drlora_jax.models.transformer import (
    Decoder,
    abstract_lora,
    abstract_params,
)
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes
from drlora_jax.parallel.mesh_checks import check_model_divides
from drlora_jax.parallel.sharded_ops import sharded_ops
from drlora_jax.runs.checkpoint_read import read_newest
from drlora_jax.runs.source import RunSource, find_run
from drlora_jax.system.precision import resolve_dtype
from drlora_jax.training.costs import checked_expert_backend, experts_line


class Loaded(NamedTuple):
    """Holds a model in memory. `model.apply(variables, tokens, segment_ids, positions)` runs it."""

    model: Decoder
    variables: dict  # params; with an adapter also lora and rank_mask
    tokenizer: Any
    end_token_ids: tuple[int, ...]  # each of them ends an answer
    directory: pathlib.Path  # directory of the base model
    base_fingerprint: str
    mesh: Mesh
    experts: str  # backend that computes experts
    config: TrainConfig | None = None  # the run's; None for a base model given by its path
    run_dir: pathlib.Path | None = None
    step: int | None = None  # step of the checkpoint; None for a base model alone
    ranks_LE: np.ndarray | None = None  # i32, active ranks of the routed experts
    # Called after each computed batch, or token.
    on_batch: Callable[[], None] = lambda: None

    @property
    def is_adapted(self) -> bool:
        return self.step is not None

    @property
    def computed(self) -> str:
        """Returns the log line that names the implementation of each operation."""
        device, dtype = self.mesh.devices.flat[0], self.model.options.dtype
        return experts_line(self.model.config, self.experts, device, dtype)

    def base(self) -> "Loaded":
        """Returns the same model without its adapter."""
        options = dataclasses.replace(self.model.options, adapter=NO_ADAPTER)
        return self._replace(
            model=self.model.clone(options=options),
            variables={"params": self.variables["params"]},
            step=None,
            ranks_LE=None,
        )


def load_base(
    path: str,
    *,
    dtype: str | None = None,
    mesh: MeshSection | None = None,
    words: Words | None = None,
) -> Loaded:
    """Loads a base model from a directory, a hub name or `bundled:NAME`; dtype None means `auto`.

    Args:
      words: The `Words` of that path, if they have been opened already.
    """
    words = words or of_base(find_model(path, option="--model"))
    return _load(words, dtype or "auto", NO_ADAPTER, mesh or MeshSection())


def load_run(
    run_dir: str,
    *,
    step: str | Sequence[int] = "latest",
    base_only: bool = False,
    model_path: str | None = None,
    dtype: str | None = None,
    mesh: MeshSection | None = None,
    words: Words | None = None,
) -> Loaded:
    """Loads a run's model at a checkpoint.

    Args:
      step: `latest`, `best` (smallest held-out loss), the number of a kept step, or several steps,
        of which the first undamaged one is used.
      base_only: Load the base model that the run started from, without the adapter.
      model_path: Where the base model is now, if it has moved; its fingerprint must be the same.
      dtype: Dtype of base weights and activations; None: the run's.
      mesh: None shards rows over all devices.
      words: The `Words` of that run and step, if they have been opened already.
    """
    if words is None:
        step = "latest" if base_only else step
        words = of_run(find_run(run_dir, step=step, model_path=model_path))
    source = words.source
    adapter = NO_ADAPTER if base_only else source.adapter
    loaded = _load(
        words,
        dtype or source.config.model.dtype,
        adapter,
        mesh or MeshSection(),
        source.base_fingerprint,
    )
    loaded = loaded._replace(config=source.config, run_dir=source.run_dir)
    return loaded if base_only else _with_adapter(loaded, source)


def read_factors(source: RunSource, mesh: Mesh) -> tuple[dict, np.ndarray, RunSource]:
    """Reads the adapter weights of a checkpoint.

    Returns:
      The `lora` collection on the mesh, the ranks i32 [L, E], and the source with the step that was
      read, which differs from the first one if that was damaged.
    """
    model = Decoder(source.model_config, DecoderOptions(adapter=source.adapter))
    lora = abstract_lora(model)
    lora = mesh_lib.with_shardings(lora, mesh_lib.shardings_for(mesh, lora, "lora"))
    shape = (len(source.expert_layers), rank_axes(model)[1])
    ranks = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=mesh_lib.replicated(mesh))
    wanted = {"lora": lora, "ranks_LE": ranks}
    found = read_newest(source.checkpoints, source.steps, wanted)
    used = source._replace(steps=(found.step,))
    return found.state["lora"], np.array(found.state["ranks_LE"]), used


class Base(NamedTuple):
    """Holds a base model on its mesh."""

    model: Decoder
    params: dict
    mesh: Mesh
    experts: str  # backend that computes experts


def place_base(
    directory: pathlib.Path, dtype: str, section: MeshSection, check=lambda vocab_size: None
) -> Base:
    """Places the base model of a directory on a mesh; `dtype` may be `auto`.

    Args:
      check: Called with the size of the vocabulary before weights are read.
    """
    model_config = read_model_config(directory)
    sizes = mesh_lib.resolve_sizes(section, mesh_lib.count_devices(), jax.process_count())
    check_model_divides(model_config, sizes)
    plain = Decoder(model_config, DecoderOptions(dtype=jnp.dtype(resolve_dtype(dtype))))
    abstract = abstract_params(plain)
    match_keys(model_config, read_headers(directory), abstract)
    check(model_config.vocab_size)
    mesh = mesh_lib.make_mesh(sizes)
    experts = checked_expert_backend(
        model_config, plain.options.dtype, mesh.devices.flat[0], "auto"
    )
    options = dataclasses.replace(plain.options, ops=sharded_ops(mesh, experts=experts))
    abstract = mesh_lib.with_shardings(abstract, mesh_lib.shardings_for(mesh, abstract, "params"))
    params = load_params(model_config, directory, abstract)
    return Base(Decoder(model_config, options), params, mesh, experts)


def _load(
    words: Words, dtype: str, adapter: Placement, section: MeshSection, digest=None
) -> Loaded:
    directory = words.directory
    check = functools.partial(check_vocabulary, words.tokenizer)
    base = place_base(directory, dtype, section, check)
    options = dataclasses.replace(base.model.options, adapter=adapter)
    return Loaded(
        model=base.model.clone(options=options),
        variables={"params": base.params},
        tokenizer=words.tokenizer,
        end_token_ids=words.end_token_ids,
        directory=directory,
        base_fingerprint=digest or fingerprint(directory),
        mesh=base.mesh,
        experts=base.experts,
    )


def _with_adapter(loaded: Loaded, source: RunSource) -> Loaded:
    lora, ranks_LE, source = read_factors(source, loaded.mesh)
    gates = rank_gates(loaded.model, ranks_LE, loaded.mesh)
    variables = loaded.variables | {"lora": lora, "rank_mask": gates}
    return loaded._replace(variables=variables, step=source.step, ranks_LE=ranks_LE)


def rank_gates(model: Decoder, ranks_LE: np.ndarray, mesh: Mesh | None = None) -> dict:
    """Returns the `rank_mask` collection for given ranks: 1 for an active rank, 0 otherwise."""
    mask_LER = masks_from_ranks(ranks_LE, model.options.adapter.max_rank)
    if mesh is not None:
        mask_LER = processes.place(mask_LER, mesh_lib.shardings_for(mesh, mask_LER, "mask_LER"))
    return masks_tree(model, jnp.asarray(mask_LER))
