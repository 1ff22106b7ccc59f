from __future__ import annotations

from transformers import Olmo3Config, Olmo3ForCausalLM

from tests.families.harness import FamilyTests, Tiny

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

TINY = Tiny(
    Olmo3Config,
    Olmo3ForCausalLM,
    {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]},
    {
        "yarn-rope": {"rope_scaling": YARN},
        "given-amplitude": {"rope_scaling": YARN | {"attention_factor": 1.5}},
        "two-ropes": {
            "rope_parameters": {
                FULL: YARN | {"rope_theta": 2000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
            }
        },
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True},
    },
)


class TestOlmo3(FamilyTests):
    tiny = TINY
