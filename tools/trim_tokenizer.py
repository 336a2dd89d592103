"""Shortens a byte-level BPE tokenizer to its first merges: the stored tokenizers of tests/street.

    python tools/trim_tokenizer.py gpt_neox gpt_neox_20b_tokenizer.json.gz
    python tools/trim_tokenizer.py smollm2 build/smollm2/tokenizer.json
    python tools/trim_tokenizer.py gpt2 gpt2.tiktoken
    python tools/trim_tokenizer.py qwen3 qwen.tiktoken

Normalizer, pre-tokenizer, post-processor, decoder and added tokens stay as they are; ids are
numbered anew, in the old order. A source is a tokenizer.json (or one in gzip), or a list of ranked
tokens as tiktoken reads it, where `RANKED` has the rest of the tokenizer as its model publishes it.
Where the files come from, and under which licence: tests/street/tokenizers/README.md.
"""

import argparse
import base64
import gzip
import json
import pathlib

OUT = pathlib.Path(__file__).parents[1] / "tests" / "street" / "tokenizers"
MERGES, MAX_BYTES = 1500, 30_000
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool = True) -> dict:
    options = {"add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets}
    return {"type": "ByteLevel", **options, "use_regex": use_regex}


def added(start: int, texts: str, *, special: bool, normalized: bool = False) -> list[dict]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized}
    return [
        {"id": start + index, "content": text, **flags, "special": special}
        for index, text in enumerate(texts.split())
    ]


RANKED = {
    "gpt2": {
        "added_tokens": added(50256, "<|endoftext|>", special=True, normalized=True),
        "normalizer": None,
        "pre_tokenizer": byte_level(False, True),
        "post_processor": byte_level(True, False),
        "decoder": byte_level(True, True),
    },
    "qwen3": {
        "added_tokens": added(
            151643,
            "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
            "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> "
            "<|vision_pad|> <|image_pad|> <|video_pad|>",
            special=True,
        )
        + added(
            151657,
            "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
            "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>",
            special=False,
        ),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN_WORDS},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level(False, False, False),
            ],
        },
        "post_processor": byte_level(False, False, False),
        "decoder": byte_level(False, False, False),
    },
}


def settings(tokenizer_class: str, length: int, **ends: str) -> dict:
    common = {"clean_up_tokenization_spaces": False, "model_max_length": length}
    return {"add_prefix_space": False, **common, "tokenizer_class": tokenizer_class, **ends}


END = "<|endoftext|>"
SETTINGS = {
    "gpt_neox": settings(
        "GPTNeoXTokenizer",
        2048,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token="<|padding|>",
    ),
    "gpt2": settings("GPT2Tokenizer", 1024, bos_token=END, eos_token=END, unk_token=END),
    "smollm2": settings(
        "GPT2Tokenizer",
        8192,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token=END,
        pad_token="<|im_end|>",
    ),
    "qwen3": settings("Qwen2Tokenizer", 131072, eos_token="<|im_end|>", pad_token=END),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SETTINGS))
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args()
    text, merges = shorten(read_source(args.name, args.source))
    folder = args.out / args.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    configuration = json.dumps(SETTINGS[args.name], indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(configuration)
    print(f"{folder}: {merges} merges, {len(text.encode()):,} bytes")


def read_source(name: str, file: pathlib.Path) -> dict:
    data = file.read_bytes()
    if file.suffix == ".gz":
        data = gzip.decompress(data)
    if file.suffix == ".tiktoken":
        return {**RANKED[name], "model": from_ranks(data)}
    return json.loads(data)


def from_ranks(data: bytes) -> dict:
    """Builds vocabulary and merges from ranked tokens: a token's merge is what all earlier ones
    leave.
    """
    pairs = (line.split() for line in data.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    letters = byte_letters()
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1])[: 256 + 2 * MERGES]:
        if len(token) > 1:
            left, right = parts_before(token, rank, ranks)
            merges.append([spell(left, letters), spell(right, letters)])
    vocabulary = {spell(token, letters): rank for token, rank in ranks.items()}
    names = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    model = {"type": "BPE", **dict.fromkeys(names), "fuse_unk": False, "byte_fallback": False}
    return {**model, "vocab": vocabulary, "merges": merges}


def parts_before(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        found = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        at = found.index(min(found))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def byte_letters() -> dict[int, str]:
    """Returns how byte-level tokenizers write a byte: unchanged if it is a visible character."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}


def spell(token: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in token)


def shorten(values: dict) -> tuple[str, int]:
    """Returns the JSON text with the most merges that fit, and how many these are."""
    for merges in range(MERGES, 0, -10):
        text = json.dumps(cut(values, merges), ensure_ascii=False, separators=(",", ":"))
        if len(text.encode()) <= MAX_BYTES:
            return text, merges
    raise SystemExit(f"added tokens alone take more than {MAX_BYTES:,} bytes")


def cut(values: dict, count: int) -> dict:
    model = values["model"]
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    later = {"".join(pair) for pair in pairs[count:]}
    later |= {token for token in model["vocab"] if len(token) > 1}
    kept = {"".join(pair) for pair in pairs[:count]}
    old = {token["content"]: token["id"] for token in values["added_tokens"]}
    old |= {token: i for token, i in model["vocab"].items() if token in kept or token not in later}
    new = {token: index for index, token in enumerate(sorted(old, key=old.get))}
    vocabulary = {token: new[token] for token in new if token in model["vocab"]}
    tokens = [token | {"id": new[token["content"]]} for token in values["added_tokens"]]
    merges = [" ".join(pair) for pair in pairs[:count]]
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        **{name: values[name] for name in parts},
        "model": model | {"vocab": vocabulary, "merges": merges},
    }


if __name__ == "__main__":
    main()
