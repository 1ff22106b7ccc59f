from __future__ import annotations

from transformers import Starcoder2Config, Starcoder2ForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    Starcoder2Config,
    Starcoder2ForCausalLM,
    variants={
        "window": {"sliding_window": 8},
        "no-biases": {"use_bias": False},
        "own-head": {"tie_word_embeddings": False},
        "silu": {"hidden_act": "silu"},
    },
)


class TestStarCoder2(FamilyTests):
    tiny = TINY
