"""Train the byte-level BPE tokenizer of the small bundled MoE on the corpus of build_corpus.py.

The sample holds the same number of bytes from each domain, digits are split one by one, and the
result is a Hugging Face directory that AutoTokenizer reads without torch. It is checked to give
back 200 rows of each domain exactly, and the bytes per token of each file are printed.
    python tools/train_tokenizer.py --corpus build/corpus --out build/tokenizer
"""

import argparse
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

DOMAINS = ("stories", "books", "code", "maths")
SPECIAL = ["<|endoftext|>", "<|padding|>", "<|user|>", "<|assistant|>", "<|system|>"]  # ids 0-4
VOCAB_SIZE = 4096
SAMPLE_BYTES = 4_000_000  # of each domain, at most
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": SPECIAL[0],
    "pad_token": SPECIAL[1],
    "model_max_length": 1024,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def read_texts(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def sample_texts(corpus):
    """Returns shuffled rows of every domain, cut to the bytes of the smallest domain."""
    domains = [read_texts(corpus / "train" / f"{domain}.jsonl") for domain in DOMAINS]
    budget = min(SAMPLE_BYTES, *(sum(len(t.encode()) for t in texts) for texts in domains))
    for texts in domains:
        random.Random(0).shuffle(texts)
        left = budget
        for text in texts:
            yield text[: max(left, 0)]
            left -= len(text.encode())


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def check_tokenizer(out, corpus):
    tokenizer = AutoTokenizer.from_pretrained(out, model_max_length=10**9)  # whole rows
    if len(tokenizer) != VOCAB_SIZE or tokenizer.convert_tokens_to_ids(SPECIAL) != [0, 1, 2, 3, 4]:
        raise SystemExit(f"{out}: wrong vocabulary size ({len(tokenizer)}) or special ids")
    for path in [corpus / split / f"{d}.jsonl" for split in ("train", "heldout") for d in DOMAINS]:
        texts = read_texts(path)
        for text in random.Random(1).sample(texts, min(200, len(texts))):
            if tokenizer.decode(tokenizer.encode(text)) != text:
                raise SystemExit(f"{path}: a row does not survive encode and decode: {text[:80]!r}")
        size = sum(len(text.encode()) for text in texts)
        tokens = sum(
            len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts)
        )
        print(f"{path}: {size} bytes, {tokens} tokens, {size / tokens:.2f} bytes/token")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/tokenizer"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(sample_texts(args.corpus)).save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    check_tokenizer(args.out, args.corpus)


if __name__ == "__main__":
    main()
