"""Adapts our models to lm-evaluation-harness: texts in, log-likelihoods and texts out.

What the harness leaves to a model is done as in its own `hf` model: tokenization, the token before
an empty context, which end of a long context is truncated, and where a generated answer ends.
However, a generated answer keeps its leading space, which `hf` drops with some tokenizers.
`benchmarks/harness_parity.py` compares the two sample by sample. `harness` imports this file, where
lm_eval is installed.
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

DEFAULT_LENGTH = 2048  # tokens, for a model that names no maximum context
NO_LIMIT = 10**9  # a tokenizer's model_max_length above this means that it has none
NEW_TOKENS = 256  # default of tasks that name no number
_NUMBERS_OF_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Options(NamedTuple):
    """Holds the harness's settings of a generated answer."""

    stop: tuple[str, ...]
    new_tokens: int
    sampling: Sampling


class JaxLM(TemplateLM):
    """Answers the harness's requests in batches, with one set of compiled programs per type.

    Args:
      max_length: Tokens that the model reads; None: as in its config.json.
      seed: Seed of sampled answers; greedy answers do not depend on it.
      writer: Writer of chats; None: the tokenizer's own chat template.
      has_system: Whether the user gave a system message, which must then not be dropped.
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
        # Created when a task generates: on some devices it holds a second copy of the weights.
        return Generator(self._loaded, batch_size=self.batch_size)

    @property
    def eot_token_id(self) -> int:
        """Returns the tokenizer's eos token, or the first token that ends an answer."""
        if not self._loaded.end_token_ids:
            raise UserError(
                "The tokenizer has no bos or eos token, and config.json has no eos_token_id, so "
                "there is no token to precede a text without context. Set eos_token in "
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
        """Formats a conversation as in the run's training, or by the tokenizer's template.

        Control tokens in user text stay escaped until `tok_encode`. Without a generation prompt the
        last turn is the beginning of the answer.
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
            self._say_once("the template has no system message; those of the task are dropped")
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
                raise RunError(f"Task {request.task_name} requests the score of an empty text.")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, continuation in requests:
            self._check(text, continuation)
            # A context of only spaces passes them to the continuation and has no tokens left.
            pairs.append((context or [self.prefix_token_id], continuation))
        return [(found.total, found.is_greedy) for found in self._score(pairs)]

    def _check(self, text: str, continuation: Sequence[int]) -> None:
        if not continuation:
            raise RunError(f"{text[:80]!r} adds no token to its context.")
        if len(continuation) > self.max_length:
            raise UserError(
                f"An answer has {len(continuation)} tokens ({text[:80]!r}...), but --max-length is "
                f"{self.max_length}; use a larger --max-length or another task."
            )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """Predicts every token once, from the preceding tokens of its window."""
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
        """Answers requests, those of equal options together."""
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
        """Returns the end of the context, truncated on the left to leave room for the answer."""
        room = self.max_length - options.new_tokens
        if room < 1:
            raise UserError(
                f"A task requests {options.new_tokens} new tokens, but prompt and answer together "
                f"have at most {self.max_length}; use a smaller --max-new-tokens."
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
    """Reads a task's generation settings.

    Raises:
      UserError: If a setting would be ignored.
    """
    left = dict(given)
    stop = left.pop("until", None) or []
    stop = [stop] if isinstance(stop, str) else stop
    numbers = [left.pop(name, None) for name in _NUMBERS_OF_TOKENS]
    new_tokens = int(next((number for number in numbers if number is not None), NEW_TOKENS))
    if left.pop("num_beams", 1) != 1:
        raise UserError("A task requests beam search (num_beams), which is not supported.")
    sampling = _sampling(left)
    if left:
        raise UserError(
            f"A task has the generation settings {', '.join(sorted(left))}, which are not "
            f"supported; supported are until, {', '.join(_NUMBERS_OF_TOKENS)}, do_sample, "
            "temperature, top_p and top_k."
        )
    return Options(tuple(text for text in stop if text), new_tokens, sampling)


def _sampling(left: dict) -> Sampling:
    """Pops the sampling settings from `left`; a temperature above 0 implies do_sample."""
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
    """Returns the model's maximum context in tokens: of config.json, or else of the tokenizer."""
    values = json.loads((loaded.directory / "config.json").read_text(encoding="utf-8"))
    values = values.get("text_config") or values
    given = values.get("max_position_embeddings") or loaded.tokenizer.model_max_length
    return int(given) if given and given < NO_LIMIT else DEFAULT_LENGTH
