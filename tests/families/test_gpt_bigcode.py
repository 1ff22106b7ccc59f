from __future__ import annotations

from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    variants={
        "many-key-heads": {"multi_query": False},
        "narrow-mlp": {"n_inner": 96},
        "own-head": {"tie_word_embeddings": False},
        "unscaled": {"scale_attn_weights": False},
    },
)


class TestGPTBigCode(FamilyTests):
    tiny = TINY
