from __future__ import annotations

from transformers import SmolLM3Config, SmolLM3ForCausalLM

from tests.families.harness import FamilyTests, Tiny

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 8}

TINY = Tiny(
    SmolLM3Config,
    SmolLM3ForCausalLM,
    {"no_rope_layer_interval": 2},
    {
        "listed": {"no_rope_layers": [0, 1, 1]},
        "none-rotates": {"no_rope_layers": [0, 0, 0]},
        "windows-without-rope": WINDOW,
        "listed-windows": WINDOW | {"layer_types": [SLIDING, FULL, SLIDING]},
        "own-head": {"tie_word_embeddings": False},
        "biases": {"attention_bias": True, "mlp_bias": True},
    },
)


class TestSmolLM3(FamilyTests):
    tiny = TINY
