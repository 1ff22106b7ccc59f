from __future__ import annotations

import pytest
from transformers import CodeGenConfig, CodeGenForCausalLM

from sl_serve.errors import ModelError
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

TINY = Tiny(
    CodeGenConfig,
    CodeGenForCausalLM,
    {"rotary_dim": 4, "num_attention_heads": 8},
    {
        "one-head-in-a-part": {"num_attention_heads": 4},
        "narrow-mlp": {"n_inner": 96},
        "tied": {"tie_word_embeddings": True},
    },
)


class TestCodeGen(FamilyTests):
    tiny = TINY


def test_heads_that_four_parts_cannot_share_are_refused() -> None:
    with pytest.raises(ModelError, match="6 heads cannot stand in 4 parts"):
        config_of(TINY, n_head=6, n_embd=48)
