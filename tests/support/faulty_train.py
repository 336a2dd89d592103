"""`python faulty_train.py FAULT [arguments of drlora_jax.train]`: a training in which process 1
goes wrong in its second step of this start.

    mask     one bit of its copy of the rank mask flips
    kill     it is killed
    apart    its run.dir is another directory
    heldout  its held-out data is other data
    term     it gets SIGTERM; steps are slow from then on, as all hear of it within seconds
"""

import os
import signal
import sys
import time

import jax
import numpy as np

from drlora_jax import cli, train
from drlora_jax.parallel import agreement

BAD_STEP, BAD_PROCESS = 2, 1
compile_step = train.compile_step


def compile_faulty(run):
    compiled, seconds = compile_step(run)
    taken = []

    def step(params, state, batch):
        taken.append(None)
        if len(taken) == BAD_STEP and jax.process_index() == BAD_PROCESS:
            state = FAULTS[fault](state)
        if len(taken) >= BAD_STEP and fault == "term":
            time.sleep(2)
        return compiled(params, state, batch)

    return step, seconds


def flip_a_bit(state):
    mask_LER = state.mask_LER
    parts = [np.array(shard.data) for shard in mask_LER.addressable_shards]
    parts[0][0, 0, -1] = 1 - parts[0][0, 0, -1]
    placed = [
        jax.device_put(part, shard.device)
        for part, shard in zip(parts, mask_LER.addressable_shards, strict=True)
    ]
    mask_LER = jax.make_array_from_single_device_arrays(mask_LER.shape, mask_LER.sharding, placed)
    return state._replace(mask_LER=mask_LER)


def send(number):
    def signal_self(state):
        os.kill(os.getpid(), number)
        return state

    return signal_self


FAULTS = {"mask": flip_a_bit} | dict.fromkeys(("apart", "heldout"), lambda state: state)
FAULTS |= {"kill": send(signal.SIGKILL), "term": send(signal.SIGTERM)}

ELSEWHERE = {"apart": "run.dir=elsewhere", "heldout": "data.eval_path=train.jsonl"}

if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if fault in ELSEWHERE and os.environ["JAX_PROCESS_ID"] == str(BAD_PROCESS):
        sys.argv.append(ELSEWHERE[fault])
    agreement.SHARED_WITHIN = 2
    train.compile_step = compile_faulty
    train.memory_lines = lambda *_: []  # the step is a function here, not a compiled program
    cli.run_and_exit(train.main)
