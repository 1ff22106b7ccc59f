from __future__ import annotations

from transformers import MixtralConfig, MixtralForCausalLM

from tests.families.experts import joined_expert
from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    MixtralConfig,
    MixtralForCausalLM,
    variants={
        "one-expert": {"num_experts_per_tok": 1},
        "all-experts": {"num_local_experts": 3, "num_experts_per_tok": 3},
        "window": {"sliding_window": 5},
        "tied": {"tie_word_embeddings": True},
        "other-heads": {"head_dim": 24, "num_key_value_heads": 4},
    },
)


class TestMixtral(FamilyTests):
    tiny = TINY
    find = staticmethod(joined_expert)
