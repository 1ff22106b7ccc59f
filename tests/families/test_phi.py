from __future__ import annotations

from transformers import PhiConfig, PhiForCausalLM

from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

TINY = Tiny(
    PhiConfig,
    PhiForCausalLM,
    variants={
        "many-key-heads": {"num_key_value_heads": 4},
        "normed-heads": {"qk_layernorm": True},
        "tied": {"tie_word_embeddings": True},
        "quarter-rotated": {"partial_rotary_factor": 0.25},
        "relu": {"hidden_act": "relu"},
    },
)


class TestPhi(FamilyTests):
    tiny = TINY


def test_half_of_each_head_turns_where_nothing_else_is_said() -> None:
    (rope,) = config_of(TINY, rope_parameters="absent").ropes
    assert rope.n_dims == 8
