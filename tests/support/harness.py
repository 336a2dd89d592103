"""What tests of lm-evaluation-harness share: words, and scores by one full pass for each text."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.models.transformer import logits

WORDS = "the cat sat on a mat and saw two old dogs run over green hills in rain".split()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def forward(model):
    def apply(variables, tokens_BT, segments_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        hidden_BTD, _ = model.apply(variables, tokens_BT, segments_BT, positions_BT)
        return logits(model.config, variables["params"], hidden_BTD)[0]

    return jax.jit(apply)


def log_probabilities(loaded, ids):
    """Of one text alone in a row, by NumPy's log-softmax in f64 [T, V]."""
    padding = (0, 128 - len(ids))  # one length: one program
    tokens_BT = np.pad(np.array(ids, np.int32), padding)[None]
    segments_BT = np.pad(np.ones(len(ids), np.int32), padding)[None]
    scores = np.asarray(forward(loaded.model)(loaded.variables, tokens_BT, segments_BT))
    scores = scores[: len(ids)].astype(np.float64)
    top = scores.max(axis=-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))


def one_by_one(loaded, context, continuation, *, max_length=96):
    """The log-likelihood of token ids, and whether greedy decoding would write them."""
    ids = [*context, *continuation][-(max_length + 1) :]
    table = log_probabilities(loaded, ids[:-1])[-len(continuation) :]
    total = sum(row[token] for row, token in zip(table, continuation, strict=True))
    return total, bool((table.argmax(axis=-1) == np.array(continuation)).all())


def ids_of(loaded, text):
    return loaded.tokenizer(text, add_special_tokens=False).input_ids


class with_template:
    def __init__(self, tokenizer, template):
        self.tokenizer, self.template = tokenizer, template

    def __enter__(self):
        self.before, self.tokenizer.chat_template = self.tokenizer.chat_template, self.template

    def __exit__(self, *_):
        self.tokenizer.chat_template = self.before


def make_model(loaded, **options):
    from drlora_jax.evaluation.harness_model import JaxLM

    return JaxLM(loaded, **options)


def requests_of(*arguments):
    return [SimpleNamespace(args=each, task_name="test") for each in arguments]


def greedy(loaded, ids, count):
    """The text that follows, by a full forward pass for every token."""
    written = []
    for _ in range(count):
        best = int(log_probabilities(loaded, [*ids, *written])[-1].argmax())
        if best == loaded.tokenizer.eos_token_id:
            break
        written.append(best)
    return loaded.tokenizer.decode(written, clean_up_tokenization_spaces=False)
