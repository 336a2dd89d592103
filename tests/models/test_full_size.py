"""Published models at full size, by shapes alone: nothing of them is allocated."""

import math

import jax
import pytest

from drlora_jax.models.families import key_table, parse_config
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, abstract_params

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}

OLMOE_1B_7B_0924 = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 50304,
}

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}

LLAMA_3_1_8B = LLAMA_2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}

# config.json, parameters, tensors on disk (3 and 6 at the ends and in the norms and attention of a
# layer, or 8 where queries and keys have norms; router and 3 an expert).
MODELS = {
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46_702_792_704, 3 + 32 * (6 + 1 + 3 * 8)),
    "Llama-2-7B": (LLAMA_2_7B, 6_738_415_616, 3 + 32 * (6 + 3)),
    "Llama-3.1-8B": (LLAMA_3_1_8B, 8_030_261_248, 3 + 32 * (6 + 3)),
    "OLMoE-1B-7B-0924": (OLMOE_1B_7B_0924, 6_919_161_856, 3 + 16 * (8 + 1 + 3 * 64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_tensors_add_up(name):
    values, parameters, tensors = MODELS[name]
    config = parse_config(values)
    abstract = abstract_params(Decoder(config, DecoderOptions()))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == parameters
    assert len(key_table(config, "experts")) == tensors
    places = {slot.path for slot in key_table(config, "experts").values()}
    assert places == {slot.path for slot in key_table(config, "fused").values()}
    assert places == {
        tuple(part.key for part in path) for path, _ in jax.tree.leaves_with_path(abstract)
    }
