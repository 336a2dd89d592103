"""Tokenizer directories of every kind that users bring, for tests.

    folder = directory(tmp_path, "llama2", chat_template="{% for m in messages %}...")

`STORED` are shortened tokenizers of public models (tokenizers/README.md); `MADE` are built here
with the `tokenizers` library, the same each time. All have the control tokens of `CONTROLS` and an
end of text; a beginning of text only where models of the kind have one.
"""

import functools
import json
import math
import pathlib
import re
from collections import Counter

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

HERE = pathlib.Path(__file__).parent
CORPUS = HERE.parents[1] / "drlora_jax" / "bundled" / "gsm8k" / "train.jsonl"
CONTROLS = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>")
STORED = tuple(sorted(folder.name for folder in (HERE / "tokenizers").glob("*") if folder.is_dir()))
MADE = (
    "metaspace_first",
    "metaspace_always",
    "metaspace_never",
    "llama2",
    "unigram",
    "wordpiece",
)
KINDS = (*STORED, *MADE)
CODE = "def f(x):\n    if x > 1:\n        return x + 1\n    y = [x, 2]\n    return y\n"


def directory(folder: pathlib.Path, kind: str, chat_template=None, **settings) -> pathlib.Path:
    """Writes folder/kind with tokenizer.json and tokenizer_config.json.

    Args:
      chat_template: its text; none without one.
      settings: further values of tokenizer_config.json.
    """
    target = folder / kind
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_text(tokenizer_json(kind))
    values = configuration(kind) | settings
    if chat_template is not None:
        values["chat_template"] = chat_template
    (target / "tokenizer_config.json").write_text(json.dumps(values, indent=2))
    return target


def configuration(kind: str) -> dict:
    """tokenizer_config.json of a kind, with the class that names nothing in particular."""
    if kind in STORED:
        return json.loads((HERE / "tokenizers" / kind / "tokenizer_config.json").read_text())
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "wordpiece":
        ends = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
        ends |= {"pad_token": "[PAD]"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    } | ends


@functools.cache
def tokenizer_json(kind: str) -> str:
    """The text of tokenizer.json; stored kinds get the control tokens that they lack."""
    if kind in STORED:
        made = Tokenizer.from_file(str(HERE / "tokenizers" / kind / "tokenizer.json"))
    elif kind == "unigram":
        made = _unigram()
    elif kind == "wordpiece":
        made = _wordpiece()
    elif kind == "llama2":
        made = _llama2()
    else:
        made = _metaspace(kind.partition("_")[2])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROLS])
    return made.to_str()


def _texts() -> list[str]:
    rows = [json.loads(line) for line in CORPUS.read_text().splitlines()[:150]]
    texts = [f"{row['prompt']}\n{row['response']}" for row in rows]
    return [*texts, *[CODE] * 5, "é ü ñ café naïve"]


def _specials(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def _sentencepiece_bpe(size: int = 900) -> Tokenizer:
    """BPE over "▁" with byte fallback, as Llama 2 and Mixtral have it; neither splits nor joins."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(_texts(), trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(learned["vocab"], key=learned["vocab"].get)
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    made = Tokenizer(model)
    made.add_special_tokens(_specials("<unk>", "<s>", "</s>"))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def _byte_fallback(*, strips: bool) -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strips else parts)


def _llama2() -> Tokenizer:
    made = _sentencepiece_bpe()
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = _byte_fallback(strips=True)
    return made


def _metaspace(scheme: str) -> Tokenizer:
    made = _sentencepiece_bpe()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme == "always")
    made.decoder = _byte_fallback(strips=scheme != "never")
    return made


def _unigram() -> Tokenizer:
    """Words and letters by how often they are there: no trainer, so the same each time."""
    counts = Counter()
    for text in _texts():
        for word in re.findall(r" ?\S+", f" {text}"):
            piece = word.replace(" ", "▁")
            counts.update(piece)
            counts.update(piece[:size] for size in range(2, min(len(piece), 12) + 1))
    letters = sorted(set("".join(_texts())) - set(" \n") | {"▁"})
    pieces = [piece for piece, _ in counts.most_common(900) if len(piece) > 1]
    total = counts.total()
    scores = [(piece, math.log(counts[piece] / total)) for piece in pieces]
    scores += [(letter, math.log((counts[letter] or 1) / total) - 2) for letter in letters]
    ends = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    made = Tokenizer(models.Unigram([*ends, *scores], unk_id=0))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(_specials("<unk>", "<s>", "</s>"))
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return made


def _wordpiece() -> Tokenizer:
    words = Counter(re.findall(r"[a-z]+|[^a-z\s]", " ".join(_texts()).lower()))
    letters = sorted({letter for word in words for letter in word})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokens += sorted({f"##{word[-3:]}" for word, _ in words.most_common(300) if len(word) > 4})
    tokens += [word for word, _ in words.most_common(500) if len(word) > 1]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    made.add_special_tokens(_specials("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made
