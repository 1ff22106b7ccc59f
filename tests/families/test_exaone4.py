from __future__ import annotations

from transformers import Exaone4Config, Exaone4ForCausalLM

from tests.families.harness import FamilyTests, Tiny

FULL, SLIDING = "full_attention", "sliding_attention"

TINY = Tiny(
    Exaone4Config,
    Exaone4ForCausalLM,
    {"sliding_window": 8, "sliding_window_pattern": 3},
    {
        "listed": {"layer_types": [FULL, SLIDING, FULL]},
        "no-window": {"sliding_window": None, "layer_types": [FULL] * 3},
        "tied": {"tie_word_embeddings": True},
    },
)


class TestExaone4(FamilyTests):
    tiny = TINY
