from __future__ import annotations

from transformers import Phi3Config, Phi3ForCausalLM

from tests.families.harness import FamilyTests, Tiny


def long_rope(n_pairs: int) -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(n_pairs)],
        "long_factor": [1.5 + 0.5 * i for i in range(n_pairs)],
    }


# With what is added to them, prompts become shorter than this, as long, and longer.
LONG = {"original_max_position_embeddings": 40, "rope_scaling": long_rope(n_pairs=8)}

TINY = Tiny(
    Phi3Config,
    Phi3ForCausalLM,
    variants={
        "window": {"sliding_window": 8},
        "part-of-a-head-turns": {"partial_rotary_factor": 0.75},
        "long-rope": LONG,
        "long-rope-of-a-part": LONG
        | {"partial_rotary_factor": 0.75, "rope_scaling": long_rope(n_pairs=6)},
        "tied": {"tie_word_embeddings": True},
        "one-key-head": {"num_key_value_heads": 1},
    },
)


class TestPhi3(FamilyTests):
    tiny = TINY
