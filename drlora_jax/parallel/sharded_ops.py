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

from drlora_jax.ops import Ops
from drlora_jax.ops.attention import attend
from drlora_jax.ops.cross_entropy import summed_nll
from drlora_jax.ops.grouped import Dropout, expert_mlp
from drlora_jax.parallel.mesh import ROWS


def sharded_ops(mesh: Mesh) -> Ops:
    """Ops for a mesh; the plain ones where it has one device."""
    if mesh.size == 1:
        return Ops()
    return Ops(partial(_expert_mlp, mesh), partial(_attend, mesh), partial(_summed_nll, mesh))


def _shard_map(function, mesh, in_specs, out_specs):
    # The replication check does not see through our custom gradients.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _expert_mlp(
    mesh, x_TD, expert_TK, weight_TK, w_gate_up_EDF, w_down_EFD, lora, spec, *, dropout=None
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
        y_TD = expert_mlp(
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


def _attend(mesh, q_BTNH, k_BSGH, v_BSGV, *, segment_ids_BT, positions_BT, sinks_N=None, **options):
    def local(q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT, sinks_N):
        return attend(
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


def _summed_nll(mesh, hidden_TD, head_DV, targets_T, mask_T, **options):
    def local(hidden_TD, head_DV, targets_T, mask_T):
        return summed_nll(hidden_TD, head_DV, targets_T, mask_T, **options)[None]

    rows = P(ROWS)
    # One partial sum a shard: a sum inside would be transposed to a second one.
    return jnp.sum(
        _shard_map(local, mesh, (rows, P(), rows, rows), rows)(
            hidden_TD, head_DV, targets_T, mask_T
        )
    )
