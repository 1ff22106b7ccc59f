from __future__ import annotations

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from sl_serve.errors import ModelError
from tests.families.experts import joined_expert
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

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


def test_more_experts_asked_for_than_there_are_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a token asks 9 experts, and there are [0-8]"):
        config_of(TINY, num_experts_per_tok=9)
