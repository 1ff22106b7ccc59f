from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from tests.families.harness import FamilyTests, Tiny

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

TINY = Tiny(
    LlamaConfig,
    LlamaForCausalLM,
    variants={
        "many-key-heads": {"num_key_value_heads": 4},
        "one-key-head": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "other-heads": {"head_dim": 24},
        "linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "llama3-rope": {"rope_scaling": LLAMA3},
        "yarn-rope": {"rope_scaling": YARN},
    },
)


class TestLlama(FamilyTests):
    tiny = TINY
