from __future__ import annotations

from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.families.harness import FamilyTests, Tiny

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

TINY = Tiny(
    Qwen3Config,
    Qwen3ForCausalLM,
    {"head_dim": 24},
    {
        "late-windows": WINDOW | {"max_window_layers": 1},
        "listed-windows": WINDOW | {"layer_types": [SLIDING, FULL, SLIDING]},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True},
        "yarn-rope": {"rope_scaling": YARN},
    },
)


class TestQwen3(FamilyTests):
    tiny = TINY
