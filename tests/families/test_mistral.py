from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM

from tests.families.harness import FamilyTests, Tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

TINY = Tiny(
    MistralConfig,
    MistralForCausalLM,
    {"sliding_window": None},
    {
        "window": {"sliding_window": 8},
        "window-longer-than-texts": {"sliding_window": 4096},
        "tied": {"tie_word_embeddings": True},
        "other-heads": {"head_dim": 24},
        "yarn-rope": {"rope_scaling": YARN, "sliding_window": 20},
    },
)


class TestMistral(FamilyTests):
    tiny = TINY
