from __future__ import annotations

from transformers import MinistralConfig, MinistralForCausalLM

from tests.families.harness import FamilyTests, Tiny

FULL, SLIDING = "full_attention", "sliding_attention"

TINY = Tiny(
    MinistralConfig,
    MinistralForCausalLM,
    {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING], "head_dim": 16},
    {
        "all-slide": {"layer_types": None},
        "other-heads": {"head_dim": 24},
    },
)


class TestMinistral(FamilyTests):
    tiny = TINY
