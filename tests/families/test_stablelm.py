from __future__ import annotations

from transformers import StableLmConfig, StableLmForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    StableLmConfig,
    StableLmForCausalLM,
    variants={
        "parallel": {"use_parallel_residual": True},
        "head-norms": {"qk_layernorm": True},
        "biases": {"use_qkv_bias": True},
        "half-of-a-head-turns": {"partial_rotary_factor": 0.5},
        "tied": {"tie_word_embeddings": True},
    },
)


class TestStableLM(FamilyTests):
    tiny = TINY
