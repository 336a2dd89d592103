"""Generates text: a prefill pass reads the prompts, then each step decodes one token from a cache.

    generator = Generator(load_run("runs/tiny"))
    [answer] = generator.generate([encode_prompt(text, generator.tokenizer)], max_new_tokens=64)

Rows of a batch may have any length: each has its own position, and one compiled step decodes all of
them until the last row has ended. A row ends at an end token of the model directory
(`Loaded.end_token_ids`), at a stop string, or at the limit. Cache sizes and prompt lengths are
rounded up to powers of two, so few programs are compiled. A prompt's answer does not depend on the
other prompts of its batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.data.tokenize import pad_token
from drlora_jax.errors import UserError
from drlora_jax.inference.answer_text import Answer, AnswerText, Finish, shown_tokens
from drlora_jax.inference.context import warn_beyond
from drlora_jax.inference.model import Loaded
from drlora_jax.models.transformer import logits, unroll
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes

SHORTEST_PROMPT, SHORTEST_CACHE = 32, 128  # smaller ones are padded to this many tokens


class Sampling(NamedTuple):
    """Describes how the next token is sampled; temperature 0 selects the most likely token."""

    temperature: float = 0.0
    top_k: int | None = None  # sample only from the k most likely tokens
    top_p: float | None = None  # sample only from the smallest set with this probability

    def check(self) -> None:
        """Raises UserError for invalid values."""
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise UserError(f"--temperature must be 0 or more, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k must be 1 or more, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, got {self.top_p}.")


GREEDY = Sampling()


class Generation(NamedTuple):
    text: str  # the text after the prompt, without the stop string or end token that ended it
    tokens: list[int]  # all generated tokens, including an end token
    finish: Finish


class RowState(NamedTuple):
    """Holds what a decoding step passes to the next one, besides the cache."""

    tokens_B: jax.Array  # i32, the newest token
    positions_B: jax.Array  # i32, position of that token
    is_active_B: jax.Array  # bool, no end token so far
    keys_B: jax.Array  # random key of each row


class Generator:
    """Generates with one model; compiled programs are kept between calls.

    Args:
      batch_size: Rows computed at once, rounded up to a multiple of the mesh's row shards.
    """

    def __init__(self, loaded: Loaded, *, batch_size: int = 8):
        self.tokenizer = loaded.tokenizer
        self.mesh, self._on_batch = loaded.mesh, loaded.on_batch
        self.batch_size = mesh_lib.whole_shards(loaded.mesh, batch_size)
        self._model, self._variables = loaded.model, loaded.variables
        if jax.default_backend() == "cpu":
            self._model, self._variables = unroll(loaded.model, loaded.variables)
        self._programs: dict = {}
        self._row_keys = jax.jit(_row_keys, out_shardings=mesh_lib.rows(self.mesh))
        self._ends = loaded.end_token_ids
        self._directory, self._has_warned = loaded.directory, False
        self._pad = pad_token(self.tokenizer, loaded.model.config.vocab_size) or 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: Sampling = GREEDY,
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Continues each prompt until a stop string, an end token or `max_new_tokens`.

        Args:
          prompts: Token ids, at least one per prompt.
          stop: Strings that end an answer; they may contain special tokens.
          on_text: Called with (prompt index, new text) as text becomes certain.
        """
        sampling.check()
        _check(prompts, max_new_tokens, stop)
        self._warn(max(map(len, prompts), default=0), max_new_tokens)
        shown = shown_tokens(stop, self.tokenizer)
        rules = {"limit": max_new_tokens, "ends": self._ends, "stop": stop, "shown": shown}
        answers: dict[int, Generation] = {}
        # Prompts of similar length are batched together, for less padding in the prefill.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            chosen = [prompts[index] for index in indices]
            rows = [
                Answer(AnswerText(self.tokenizer, prompt), **rules, tell=_tell(on_text, index))
                for index, prompt in zip(indices, chosen, strict=True)
            ]
            self._run(indices, chosen, rows, sampling, seed)
            for index, row in zip(indices, rows, strict=True):
                answers[index] = Generation(row.text, row.tokens, row.finish)
        return [answers[index] for index in range(len(prompts))]

    def _warn(self, longest_prompt: int, max_new_tokens: int) -> None:
        """Warns once that answers may exceed the positions that the model supports."""
        what = f"a prompt of {longest_prompt:,} and {max_new_tokens:,} new tokens"
        if longest_prompt and not self._has_warned:
            self._has_warned = warn_beyond(self._directory, longest_prompt + max_new_tokens, what)

    def _run(self, indices, prompts, rows: list[Answer], sampling: Sampling, seed: int) -> None:
        """Decodes tokens for the rows until all have ended.

        Tokens are read one step late, so that the device never waits for the host.
        """
        limit = max(row.limit for row in rows)
        steps = self._steps(indices, prompts, sampling, seed, limit)
        for tokens_B in steps:
            self._on_batch()
            for row, token in zip(rows, tokens_B.tolist(), strict=False):
                row.take(token)
            if all(row.finish for row in rows):
                steps.close()
                return

    def _steps(self, indices, prompts, sampling, seed, limit: int) -> Iterator[np.ndarray]:
        longest = max(map(len, prompts))
        width, slots = _rounded(longest, SHORTEST_PROMPT), _rounded(longest + limit, SHORTEST_CACHE)
        first, step = self._compiled(slots, sampling)
        tokens_BT = np.full((self.batch_size, width), self._pad, np.int32)
        lengths_B = np.zeros(self.batch_size, np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
            lengths_B[row] = len(prompt)
        # A row's random numbers depend on its index in the call, not on its batch.
        places = np.zeros(self.batch_size, np.uint32)
        places[: len(indices)] = indices
        key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))
        rows = mesh_lib.rows(self.mesh)
        tokens_BT, lengths_B = processes.place((tokens_BT, lengths_B), rows)
        keys_B = self._row_keys(key_data, places)
        state, cache = first(self._variables, tokens_BT, lengths_B, keys_B)
        for _ in range(limit - 1):
            tokens_B = state.tokens_B
            state, cache = step(self._variables, cache, state)
            yield processes.to_host(tokens_B)
        yield processes.to_host(state.tokens_B)

    def _compiled(self, slots: int, sampling: Sampling):
        """Returns the jitted prefill pass and decoding step for a cache of that many slots."""
        if (slots, sampling) not in self._programs:
            options = dataclasses.replace(self._model.options, cache_length=slots)
            model = self._model.clone(options=options)
            self._programs[slots, sampling] = (
                jax.jit(make_first_pass(model, sampling, self._ends)),
                jax.jit(make_decode_step(model, sampling, self._ends), donate_argnums=1),
            )
        return self._programs[slots, sampling]


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str]) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be 1 or more, got {max_new_tokens}.")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) == 0:
            raise UserError(f"Prompt {number} has no token; give some text.")
    if "" in stop:
        raise UserError("A stop string is empty and would end every answer before its first token.")


def _row_keys(key_data, places_B) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(key_data), places_B)


def make_first_pass(model, sampling: Sampling, ends: Sequence[int]) -> Callable:
    """Returns a pure `first(variables, tokens [B, T], lengths [B], keys [B]) -> (RowState, cache)`.

    Rows are padded on the right; what padding writes into the cache is beyond the row's position
    and is overwritten before it can be attended to.
    """

    def first(variables, tokens_BT, lengths_B, keys_B):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
        (hidden_BTD, _), changed = model.apply(
            variables, tokens_BT, segments_BT, positions_BT, mutable=["cache"]
        )
        last_B = jnp.maximum(lengths_B - 1, 0)
        hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
        logits_BV = logits(model.config, variables["params"], hidden_BD)
        tokens_B = choose_tokens(logits_BV, keys_B, last_B, sampling)
        is_active_B = (lengths_B > 0) & ~_is_end(tokens_B, ends)
        return RowState(tokens_B, last_B + 1, is_active_B, keys_B), changed["cache"]

    return first


def make_decode_step(model, sampling: Sampling, ends: Sequence[int]) -> Callable:
    """Returns a pure `step(variables, cache, state) -> (state, cache)`: one token for every row.

    Rows that have ended repeat their last token at their last position and are routed to no expert.
    """

    def step(variables, cache, state: RowState):
        segments_BT = state.is_active_B.astype(jnp.int32)[:, None]
        (hidden_BTD, _), changed = model.apply(
            variables | {"cache": cache},
            state.tokens_B[:, None],
            segments_BT,
            state.positions_B[:, None],
            mutable=["cache"],
        )
        logits_BV = logits(model.config, variables["params"], hidden_BTD[:, 0])
        chosen_B = choose_tokens(logits_BV, state.keys_B, state.positions_B, sampling)
        tokens_B = jnp.where(state.is_active_B, chosen_B, state.tokens_B)
        positions_B = state.positions_B + state.is_active_B
        is_active_B = state.is_active_B & ~_is_end(tokens_B, ends)
        return RowState(tokens_B, positions_B, is_active_B, state.keys_B), changed["cache"]

    return step


def _is_end(tokens_B: jax.Array, ends: Sequence[int]) -> jax.Array:
    """Returns which tokens are end tokens, bool [B]."""
    ends_E = np.array(ends, np.int32)
    return jnp.any(tokens_B[:, None] == ends_E[None], axis=1)


def choose_tokens(logits_BV, keys_B, positions_B, sampling: Sampling) -> jax.Array:
    """Samples the next token of every row, i32 [B]; a draw depends on key and position only."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = restrict(logits_BV / sampling.temperature, sampling)
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def restrict(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets the logits of tokens that top-k and then top-p exclude to minus infinity."""
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        smallest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        share_BV = jax.nn.softmax(ordered_BV, axis=-1)
        # A token stays if the sum of the more likely ones is below top_p: the first always does.
        before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
        kept_BV = jnp.where(before_BV < sampling.top_p, ordered_BV, jnp.inf)
        logits_BV = jnp.where(
            logits_BV < jnp.min(kept_BV, axis=-1, keepdims=True), -jnp.inf, logits_BV
        )
    return logits_BV


def _rounded(length: int, least: int) -> int:
    """Returns the next power of two, at least `least`."""
    return max(least, 1 << (length - 1).bit_length())


def _tell(on_text, index: int) -> Callable[[str], None]:
    return (lambda text: None) if on_text is None else (lambda text: on_text(index, text))
