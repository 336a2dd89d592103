"""The operations of `ops` over a mesh, in `shard_map`: each device works on its rows, and on its
experts.

Expert parallelism is dropless: the tokens of an expert group are gathered, every device runs its
own experts on them, and the partial sums are scattered back. Nothing else of the model needs
communication but what the partition rules say.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from drlora_jax.ops import Ops, ops_for
from drlora_jax.ops.attention import Backend
from drlora_jax.ops.grouped_parts import Dropout
from drlora_jax.parallel.mesh import ROWS, platform_of


def sharded_ops(mesh: Mesh, options: dict | None = None, *, attention: Backend = "auto") -> Ops:
    """Ops for programs of a mesh, compiled with `options`; plain ones where it has one device."""
    ops = ops_for(
        platform_of(mesh), options, expert_shards=mesh.shape["expert"], attention=attention
    )
    if mesh.size == 1:
        return ops
    return Ops(
        partial(_expert_mlp, mesh, ops.expert_mlp),
        partial(_attend, mesh, ops.attend),
        partial(_summed_nll, mesh, ops.summed_nll),
    )


def _shard_map(function, mesh, in_specs, out_specs):
    # The replication check does not see through our custom gradients.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _expert_mlp(
    mesh,
    run_local,
    x_TD,
    expert_TK,
    weight_TK,
    w_gate_up_EDF,
    w_down_EFD,
    lora,
    spec,
    *,
    dropout=None,
):
    expert_shards = mesh.shape["expert"]
    has_dropout = dropout is not None
    key = dropout.key if has_dropout else jax.random.key(0)

    def gather(array):
        return jax.lax.all_gather(array, "expert", axis=0, tiled=True)

    def local(x_TD, expert_TK, weight_TK, w_gate_up_EDF, w_down_EFD, lora, key):
        # The rows of an expert group are contiguous in the batch, so slots keep their numbers.
        group = jax.lax.axis_index("data") * mesh.shape["fsdp"] + jax.lax.axis_index("fsdp")
        first_slot = group * expert_TK.size * expert_shards
        x_TD, expert_TK, weight_TK = gather(x_TD), gather(expert_TK), gather(weight_TK)
        local_TK = expert_TK - jax.lax.axis_index("expert") * w_gate_up_EDF.shape[0]
        y_TD = run_local(
            x_TD,
            local_TK,  # outside [0, local experts): another device's
            weight_TK,
            w_gate_up_EDF,
            w_down_EFD,
            lora,
            spec,
            dropout=Dropout(key, first_slot) if has_dropout else None,
        )
        return jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True)

    rows, experts = P(ROWS), P("expert")
    run = _shard_map(local, mesh, (rows, rows, rows, experts, experts, experts, P()), rows)
    return run(x_TD, expert_TK, weight_TK, w_gate_up_EDF, w_down_EFD, lora, key)


def _attend(
    mesh,
    run_local,
    q_BTNH,
    k_BSGH,
    v_BSGV,
    *,
    segment_ids_BT,
    positions_BT,
    sinks_N=None,
    **options,
):
    def local(q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT, sinks_N):
        return run_local(
            q_BTNH,
            k_BSGH,
            v_BSGV,
            segment_ids_BT=segment_ids_BT,
            positions_BT=positions_BT,
            sinks_N=sinks_N,
            **options,
        )

    rows = P(ROWS)
    run = _shard_map(local, mesh, (rows, rows, rows, rows, rows, P()), rows)
    return run(q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT, sinks_N)


def _summed_nll(mesh, run_local, hidden_TD, head_DV, targets_T, mask_T, **options):
    def local(hidden_TD, head_DV, targets_T, mask_T):
        return run_local(hidden_TD, head_DV, targets_T, mask_T, **options)[None]

    rows = P(ROWS)
    # One partial sum a shard: a sum inside would be transposed to a second one.
    return jnp.sum(
        _shard_map(local, mesh, (rows, P(), rows, rows), rows)(
            hidden_TD, head_DV, targets_T, mask_T
        )
    )
