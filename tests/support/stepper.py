"""A run without its files that tests take through steps and events, one at a time."""

import jax
import numpy as np

from drlora_jax import train as train_lib
from drlora_jax.data.loader import split_micro_batches
from drlora_jax.interop.hf_read import load_params
from drlora_jax.training.growth import grow, start_profiled
from drlora_jax.training.job import prepare
from tests.support.tiny import tiny_config


class Stepper:
    """A run without its files: takes steps and events, keeps every position."""

    def __init__(self, tmp_path, name="run", **changes):
        self.run = train_lib.build(prepare(tiny_config(tmp_path, name, **changes)))
        self.job = self.run.job
        self.params = load_params(
            self.job.model_config, self.job.directory, self.run.abstract_params
        )
        self.job.run_dir.create(self.job.config, self.job.origin, 0)
        self.position = start_profiled(self.run, self.params)

    def batch(self, index):
        section = self.job.config.train
        batch = self.job.loader.batch(index * section.batch_size)
        return split_micro_batches(batch, section.micro_batches)

    def step(self):
        index = int(self.position.state.step)
        state, metrics = self.run.step(self.params, self.position.state, self.batch(index))
        self.position = self.position._replace(state=state)
        if self.job.policy.is_event(index + 1):
            self.position = grow(self.run, self.position, index + 1)
        return metrics


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def expert_leaves(tree):
    """(role, side) -> [L, E, R, D] of factors, or of moments, of a one-segment model."""
    moe = tree["segment_0"]["layer_0"]["moe"]
    return {
        (role, side): np.asarray(moe[f"{role}_lora"][side])
        for role in ("up", "down")
        for side in "ab"
    }
