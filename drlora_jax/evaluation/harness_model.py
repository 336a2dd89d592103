"""A model of ours as lm-evaluation-harness sees one: texts in, log-likelihoods and texts out.

What the harness leaves to a model is done as its own `hf` model does it: how a text becomes token
ids, what stands before an empty context, which end of a long context is cut off, and where a
written answer ends; but a written answer keeps the blank that it begins with, which `hf` drops with
some tokenizers. `benchmarks/harness_parity.py` compares the two sample by sample. This file is
imported where lm_eval is installed, by `harness`.
"""

import functools
import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from drlora_jax.data.tokenize import encode_prompt
from drlora_jax.data.wording import Writer, named_wording
from drlora_jax.errors import RunError, UserError
from drlora_jax.inference.generation import GREEDY, Generator, Sampling
from drlora_jax.inference.model import Loaded
from drlora_jax.inference.scoring import Scorer

DEFAULT_LENGTH = 2048  # tokens, of a model that names no longest context
NO_LIMIT = 10**9  # a tokenizer's model_max_length above this means that it knows none
NEW_TOKENS = 256  # of a task that names no number
_NUMBERS_OF_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Options(NamedTuple):
    """What the harness asks of one written answer."""

    stop: tuple[str, ...]
    new_tokens: int
    sampling: Sampling


class JaxLM(TemplateLM):
    """Answers the harness's requests in batches, each sort with one set of compiled programs.

    Args:
      max_length: tokens that the model sees; None: what its config.json says.
      seed: of sampled answers; greedy ones do not depend on it.
      writer: of chats; None: in the tokenizer's own chat template.
      has_system: whether the user gave a system message, which is not to be left out.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 0,
        writer: Writer | None = None,
        has_system: bool = False,
    ):
        super().__init__()
        self.tokenizer = loaded.tokenizer
        self.max_length = max_length or context_length(loaded)
        self.batch_size = batch_size
        self._loaded, self._seed = loaded, seed
        self._writer, self._has_system, self._said = writer, has_system, set()

    @functools.cached_property
    def _score(self) -> Scorer:
        return Scorer(self._loaded, batch_size=self.batch_size, max_length=self.max_length)

    @functools.cached_property
    def _generator(self) -> Generator:
        # Made when a task writes: on some devices it holds a second copy of the weights.
        return Generator(self._loaded, batch_size=self.batch_size)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's eos, or what else ends an answer."""
        if not self._loaded.end_token_ids:
            raise UserError(
                "The tokenizer has no bos and no eos token, and config.json no eos_token_id: there "
                "is nothing that could stand before a text without context. Set eos_token in "
                "tokenizer_config.json."
            )
        return self._loaded.end_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self._loaded.directory).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            return encode_prompt(string, self.tokenizer)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids)

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """A conversation in the words of the run, or as the tokenizer's template writes it.

        Control tokens in the text of others stay guarded until `tok_encode`. Without a generation
        prompt the last turn is the beginning of the answer.
        """
        turns, begun = list(chat_history), ""
        writer = self._writer or self._own_writer()
        if not add_generation_prompt:
            begun = writer.as_is(turns.pop()["content"]).text
        try:
            prompt = writer.turns(turns)
        except UserError:
            others = [turn for turn in turns if turn["role"] != "system"]
            if len(others) == len(turns) or self._has_system:
                raise
            prompt = writer.turns(others)
            self._say_once("the template writes no system message; those of the task are left out")
        return "".join(segment.text for segment in prompt.segments) + begun

    def _own_writer(self) -> Writer:
        return Writer(named_wording("tokenizer", self.tokenizer), self.tokenizer)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(f"note: {text}", file=sys.stderr)

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        for request in requests:
            if not request.args[1]:
                raise RunError(f"Task {request.task_name}: there is no text to score.")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, continuation in requests:
            self._check(text, continuation)
            # A context of spaces alone gives them to the continuation, and has no token left.
            pairs.append((context or [self.prefix_token_id], continuation))
        return [(found.total, found.is_greedy) for found in self._score(pairs)]

    def _check(self, text: str, continuation: Sequence[int]) -> None:
        if not continuation:
            raise RunError(f"{text[:80]!r} has no token of its own behind its context.")
        if len(continuation) > self.max_length:
            raise UserError(
                f"An answer has {len(continuation)} tokens ({text[:80]!r}...), the model sees "
                f"{self.max_length}; give a larger --max-length or another task."
            )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """Every token is predicted once, from as many tokens before it as its window has."""
        del disable_tqdm
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(self._score([pair for part in windows for pair in part]))
        return [sum(next(found).total for _ in part) for part in windows]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        cuts = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(cut) for cut in cuts]

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        """Requests of equal options are answered together."""
        del disable_tqdm
        groups: dict[Options, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(read_options(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for options, indices in groups.items():
            prompts = [self._prompt(requests[index].args[0], options) for index in indices]
            for index, text in zip(indices, self._answers(prompts, options), strict=True):
                texts[index] = text
        return texts

    def _prompt(self, context: str, options: Options) -> list[int]:
        """The end of the context, as much of it as leaves room for the answer."""
        room = self.max_length - options.new_tokens
        if room < 1:
            raise UserError(
                f"A task asks for {options.new_tokens} new tokens, the model sees "
                f"{self.max_length} in all; give a smaller --max-new-tokens."
            )
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _answers(self, prompts, options: Options) -> list[str]:
        found = self._generator.generate(
            prompts,
            max_new_tokens=options.new_tokens,
            stop=options.stop,
            sampling=options.sampling,
            seed=self._seed,
        )
        return [answer.text for answer in found]


def read_options(given: dict) -> Options:
    """A task's generation settings.

    Raises:
      UserError: for a setting that would be ignored.
    """
    left = dict(given)
    stop = left.pop("until", None) or []
    stop = [stop] if isinstance(stop, str) else stop
    numbers = [left.pop(name, None) for name in _NUMBERS_OF_TOKENS]
    new_tokens = int(next((number for number in numbers if number is not None), NEW_TOKENS))
    if left.pop("num_beams", 1) != 1:
        raise UserError("A task asks for beam search (num_beams), which there is none of here.")
    sampling = _sampling(left)
    if left:
        raise UserError(
            f"A task has the generation settings {', '.join(sorted(left))}, which are not known "
            f"here; known: until, {', '.join(_NUMBERS_OF_TOKENS)}, do_sample, temperature, top_p, "
            "top_k."
        )
    return Options(tuple(text for text in stop if text), new_tokens, sampling)


def _sampling(left: dict) -> Sampling:
    """Takes its settings out of `left`; without do_sample, a temperature above 0 asks for it."""
    temperature = left.pop("temperature", None)
    top_k, top_p = left.pop("top_k", None), left.pop("top_p", None)
    is_sampled = left.pop("do_sample", None)
    if is_sampled is None:
        is_sampled = bool(temperature)
    if not is_sampled:
        return GREEDY
    temperature = 1.0 if temperature is None else float(temperature)
    # top_k 0 means all tokens, as it does in transformers.
    sampling = Sampling(temperature, int(top_k) if top_k else None, top_p and float(top_p))
    sampling.check()
    return sampling


def context_length(loaded: Loaded) -> int:
    """Tokens that the model was made for: of config.json, else of the tokenizer."""
    values = json.loads((loaded.directory / "config.json").read_text(encoding="utf-8"))
    values = values.get("text_config") or values
    given = values.get("max_position_embeddings") or loaded.tokenizer.model_max_length
    return int(given) if given and given < NO_LIMIT else DEFAULT_LENGTH
