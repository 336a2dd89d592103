"""Sends tokens to the devices that hold their experts, and the results back (all-to-all).

A token is sent once to every device of the axis that holds any of its experts; the results that
come back are summed. Buffers have room for the worst case, every token on one device, so no token
is ever dropped. Two kinds move the same rows to the same places:

    ragged   `lax.ragged_all_to_all`: moves only the rows that are needed (TPU)
    padded   `lax.all_to_all`: for each peer as many rows as a device has (every platform)

Letters: C devices of the axis, T tokens of a device, S rows sent, Q rows received, K experts per
token, D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

RAGGED, PADDED, GATHER = "ragged", "padded", "gather"


class Traffic(NamedTuple):
    """Holds how many rows this device sends to and receives from each peer, and their offsets. All
    i32 [C].
    """

    send_from: jax.Array  # first row for a peer, in this device's send buffer
    send: jax.Array  # number of rows sent
    land_at: jax.Array  # first of these rows in the peer's receive buffer
    receive_at: jax.Array  # first row of a peer, in this device's receive buffer
    receive: jax.Array  # number of rows received
    leave_from: jax.Array  # first of these rows in the peer's send buffer

    def back(self) -> "Traffic":
        """Returns the traffic that sends the same rows back."""
        return Traffic(
            self.receive_at, self.receive, self.leave_from, self.send_from, self.send, self.land_at
        )


class Dispatch(NamedTuple):
    """Holds which tokens this device sends, sorted by peer."""

    token_S: jax.Array  # i32, index of the token; T for unused rows
    traffic: Traffic


def plan_dispatch(expert_TK: jax.Array, experts_per_peer: int, axis: str) -> Dispatch:
    """Plans the exchange, inside a shard_map over `axis`.

    Peer c holds the experts [c * experts_per_peer, (c + 1) * experts_per_peer); an index outside
    all of these ranges is sent to no peer.
    """
    peers, me = lax.axis_size(axis), lax.axis_index(axis)
    tokens, choices = expert_TK.shape
    peer_TK = expert_TK // experts_per_peer
    goes_CT = jnp.any(peer_TK[None] == jnp.arange(peers)[:, None, None], axis=2)
    send_C = jnp.sum(goes_CT, axis=1, dtype=jnp.int32)
    rows = min(choices, peers) * tokens
    (row_S,) = jnp.nonzero(goes_CT.reshape(-1), size=rows, fill_value=peers * tokens)
    token_S = jnp.where(row_S < peers * tokens, row_S % tokens, tokens)
    sent_CC = lax.all_gather(send_C, axis)  # [from, to]
    starts_CC = jnp.cumsum(sent_CC, axis=1) - sent_CC  # in the sender's buffer
    lands_CC = jnp.cumsum(sent_CC, axis=0) - sent_CC  # in the receiver's
    traffic = Traffic(
        starts_CC[me], send_C, lands_CC[me], lands_CC[:, me], sent_CC[:, me], starts_CC[:, me]
    )
    return Dispatch(token_S.astype(jnp.int32), traffic)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def exchange(kind: str, axis: str, places: int, rows_SD: jax.Array, traffic: Traffic) -> jax.Array:
    """Returns the rows that the peers send to this device, [places, ...], zero after the last."""
    move = _ragged if kind == RAGGED else _padded
    return move(axis, places, rows_SD, traffic)


def _exchange_forward(kind, axis, places, rows_SD, traffic):
    return exchange(kind, axis, places, rows_SD, traffic), (traffic, rows_SD.shape[0])


def _exchange_backward(kind, axis, places, saved, d_rows_QD):
    traffic, rows = saved
    if not jnp.issubdtype(d_rows_QD.dtype, jnp.floating):  # integers have no gradient
        return None, None
    return exchange(kind, axis, rows, d_rows_QD, traffic.back()), None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _ragged(axis, places, rows_SD, traffic):
    return lax.ragged_all_to_all(
        rows_SD,
        jnp.zeros((places, *rows_SD.shape[1:]), rows_SD.dtype),
        traffic.send_from,
        traffic.send,
        traffic.land_at,
        traffic.receive,
        axis_name=axis,
    )


def _padded(axis, places, rows_SD, traffic):
    # No peer sends or receives more rows than a device has tokens: the smaller buffer holds them.
    peers = traffic.send.shape[0]
    most = max(places, rows_SD.shape[0]) // peers
    row_M = jnp.arange(most)
    from_CM = traffic.send_from[:, None] + row_M[None]
    is_sent_CM = row_M[None] < traffic.send[:, None]
    sent_CMD = rows_SD.at[jnp.where(is_sent_CM, from_CM, rows_SD.shape[0])].get(
        mode="fill", fill_value=0
    )
    got_CMD = lax.all_to_all(sent_CMD, axis, split_axis=0, concat_axis=0, tiled=True)
    is_got_CM = row_M[None] < traffic.receive[:, None]
    at_CM = jnp.where(is_got_CM, traffic.receive_at[:, None] + row_M[None], places)
    empty = jnp.zeros((places, *rows_SD.shape[1:]), rows_SD.dtype)
    return empty.at[at_CM].set(got_CMD, mode="drop")


def choose_exchange(wanted: str, platform: str, peers: int, experts_per_token: int) -> str:
    """Returns the kind of exchange: `auto` uses `ragged` on TPU if a token's experts, evenly
    spread, are expected on less than half of the devices, and otherwise gathers all tokens.
    """
    if wanted != "auto":
        return wanted
    reached = 1.0 - (1.0 - 1.0 / peers) ** experts_per_token
    return RAGGED if platform == "tpu" and peers > 1 and reached < 0.5 else GATHER
