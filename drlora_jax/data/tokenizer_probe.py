"""Compares tokenizers on texts that reveal almost any difference.

Differences of normalizers, splitters, decoders and post-processors show on blanks, digits,
capitals, newlines, accents, ligatures, other scripts, emoji, code, and around added tokens; those
of a vocabulary on each of its tokens. Runs store a digest of the ids of these texts
(`tokenizer_identity`): changing a text makes every stored run look as if its tokenizer had changed.
"""

import os

TEXTS = (
    "",
    "a",
    " ",
    "   ",
    "Tom has 3 apples and 1234567 pears, 3.14 or 2,000.",
    "  two blanks in front, two behind  ",
    "one  two   three    four        eight                        twenty-four",
    "a .b ,c !d ?e 's n't I'm we're THEY'LL don't can not",
    "lower UPPER Title camelCase snake_case SHOUTING123abc",
    "line\nline\n\nline\n\n\n\tindented\r\nwindows \n blank lines\n   \n",
    "\n",
    "\t\ttabs\tinside\u00a0hard\u2003wide\u200bzero",
    "café cafe\u0301 naïve Ångström A\u030angström straße İstanbul",
    "ﬁne ＡＢＣ １２３ ½ ① ™ x² \u212b \u2126",
    "日本語のテキスト。 你好，世界！ 한국어",
    "Привет مرحبا नमस्ते שלום",
    "😀👍\U0001f3fd 🇩🇪 👨\u200d👩\u200d👧 ok",
    "def f(x):\n    if x > 1:\n        return x**2 + 1  # why?\n\treturn {'a': [1, 2]}\n",
    "▁under ▁▁score Ġbyte ##piece </w> <0x41> <unk>",
    "https://example.org/a?b=1&c=%20 user@example.org $5.00 100% (a+b)*c != d && e || f",
    "“quoted” ‘it’s’ — … -- ... *** ### === ```",
)
WINDOW = 256  # tokens decoded at once
SAMPLED = 24  # windows whose text is re-encoded


def probe_texts(added_tokens: dict) -> list[str]:
    """Returns the texts, and texts with each added token alone, in the middle, and between blanks
    and letters.
    """
    texts = list(TEXTS)
    for _, token in sorted(added_tokens.items()):
        token = token.content
        texts += [token, f"a{token}b", f"Tom {token} has {token}{token}  3\n{token}\n"]
    return texts


def first_difference(tokenizer, own) -> str | None:
    """Describes the first difference between a transformers tokenizer and its file; None if there
    is none.

    Args:
      own: the `tokenizers.Tokenizer` of the file, without truncation and padding.
    """
    vocabulary = tokenizer.get_vocab()
    for token, index in sorted(own.get_vocab().items(), key=lambda item: item[1]):
        if vocabulary.get(token) != index:
            got = vocabulary.get(token)
            return f"the token {token!r} has the id {got}, but {index} in the file"
    known = sorted(own.get_vocab().values())
    spans = [known[start : start + WINDOW] for start in range(0, len(known), WINDOW)]
    sampled = spans[:: max(1, len(spans) // SAMPLED)]
    texts = probe_texts(own.get_added_tokens_decoder())
    texts += [own.decode(span, skip_special_tokens=True) for span in sampled]
    expected = []
    for special in (False, True):
        expected = [e.ids for e in own.encode_batch(texts, add_special_tokens=special)]
        got = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        for text, ids, wanted in zip(texts, got, expected, strict=True):
            if list(ids) != wanted:
                return f"{shown(text)} {_where(list(ids), wanted)}"
    for ids in [*expected, *spans]:
        for skip in (False, True):
            text = decoded(tokenizer, ids, skip=skip)
            wanted = own.decode(ids, skip_special_tokens=skip)
            if text != wanted:
                return f"the ids {shown(ids)} become {shown(text)}, but {shown(wanted)} by the file"
    return None


def sentencepiece_difference(tokenizer, processor) -> str | None:
    """Describes the first difference to a `SentencePieceProcessor`, which knows no control tokens
    in texts.

    Without one (None), the texts are only tokenised.
    """
    texts = [text for text in TEXTS if "<unk>" not in text]
    got = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for text, ids in zip(texts, got, strict=True):
        wanted = list(ids) if processor is None else list(processor.encode(text))
        if list(ids) != wanted:
            return f"{shown(text)} {_where(list(ids), wanted)}"
    return None


def decoded(tokenizer, ids, *, skip: bool) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def shown(value) -> str:
    """Shortens a text or ids for a message of one line."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}..."
    more = ", ..." if len(value) > 6 else ""
    return f"[{', '.join(map(str, value[:6]))}{more}]"


def _where(ids: list[int], wanted: list[int]) -> str:
    at = len(os.path.commonprefix([ids, wanted]))
    start = f" from token {at + 1} on" if at else ""
    return f"becomes {shown(ids[at:])}{start}, but {shown(wanted[at:])} by the file"
