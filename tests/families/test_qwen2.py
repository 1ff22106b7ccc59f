from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.families.harness import FamilyTests, Tiny

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

TINY = Tiny(
    Qwen2Config,
    Qwen2ForCausalLM,
    variants={
        "late-windows": WINDOW | {"max_window_layers": 1},
        "listed-windows": WINDOW | {"layer_types": [SLIDING, FULL, SLIDING]},
        "unused-window": {"sliding_window": 8, "max_window_layers": 0},
        "tied": {"tie_word_embeddings": True},
        "yarn-rope": {"rope_scaling": YARN},
    },
)


class TestQwen2(FamilyTests):
    tiny = TINY
