"""Checks that all processes of a training agree before it starts, grows or saves."""

import json

import jax

from drlora_jax.allocation import masks_from_ranks
from drlora_jax.config import to_dict
from drlora_jax.config.flat import flat
from drlora_jax.parallel.agreement import (
    check_agreement,
    digest,
    digest_on_devices,
    digest_settings,
)
from drlora_jax.runs.provenance import versions
from drlora_jax.training.program import Run


def check_processes_agree(run: Run, when: str, step: int, position=None) -> None:
    """Raises RunError when the processes differ in settings, data or state.

    Args:
      position: If given, its ranks and its mask are compared; otherwise whatever determines the
        schedule.
    """
    if jax.process_count() == 1:
        return
    job = run.job
    fields = {
        "step": digest(str(step)),
        "config": digest_settings(flat(to_dict(job.config))),
        "base": digest(job.origin["base_fingerprint"]),
        "data": digest(job.origin["data_fingerprint"]),
        "versions": digest(json.dumps(versions())),
    }
    if position is None:
        # These determine how many steps, evaluations and collectives there are.
        fields |= {
            "schedule": digest(f"{job.total_steps} {job.schedule_steps}"),
            "held-out data": digest(*jax.tree.leaves(job.eval_batches)),
            "initial ranks": digest(job.policy.init().ranks_LE),
        }
        check_agreement(when, fields)
    else:
        ranks_LE = position.capacity.ranks_LE
        expected_LER = masks_from_ranks(ranks_LE, job.adapter.max_rank)
        held = digest_on_devices(position.state.mask_LER, expected_LER)
        fields |= {"ranks": digest(ranks_LE), "mask": held}
        check_agreement(when, fields, {"mask": digest(expected_LER)})
