from __future__ import annotations

from typing import Any

import pytest
from transformers import MptConfig, MptForCausalLM

from sl_serve.errors import ModelError
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

TINY = Tiny(
    MptConfig,
    MptForCausalLM,
    {"max_seq_len": 256},
    {
        "six-heads": {"hidden_size": 72, "num_attention_heads": 6},
        "clipped": {"attn_config": {"clip_qkv": 0.5}},
        "own-scale": {"attn_config": {"softmax_scale": 0.5}},
        "own-head": {"tie_word_embeddings": False},
    },
)


class TestMpt(FamilyTests):
    tiny = TINY


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"no_bias": False}, "no_bias False is not supported"),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale 'inv_sqrt_d_model' is not supported"),
        ({"expansion_ratio": 2}, "expansion_ratio 2 is not supported"),
        ({"attn_config": {"alibi_bias_max": 16}}, "attn_config: alibi_bias_max 16"),
        ({"attn_config": {"alibi": False}}, "attn_config: alibi False is not supported"),
        ({"attn_config": {"qk_ln": True}}, "attn_config: qk_ln True is not supported"),
        ({"attn_config": {"prefix_lm": True}}, "attn_config: prefix_lm True is not supported"),
        ({"attn_config": 7}, "attn_config must be an object"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        config_of(TINY, **changes)
