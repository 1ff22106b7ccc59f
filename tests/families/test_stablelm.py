from __future__ import annotations

from transformers import StableLmConfig, StableLmForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    StableLmConfig,
    StableLmForCausalLM,
    variants={
        "many-key-heads": {"num_key_value_heads": 4},
        "biases": {"use_qkv_bias": True},
        "parallel": {"use_parallel_residual": True},
        "normed-heads": {"qk_layernorm": True},
        "12b": {"qk_layernorm": True, "use_parallel_residual": True},
        "tied": {"tie_word_embeddings": True},
        "half-rotated": {"partial_rotary_factor": 0.5},
        "gelu": {"hidden_act": "gelu"},
    },
)


class TestStableLm(FamilyTests):
    tiny = TINY
