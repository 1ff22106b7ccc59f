from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma2Config, Gemma2ForCausalLM

from sl_serve.errors import ModelError
from sl_serve.models import gemma2
from sl_serve.ops import CAUSAL
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

# Small enough to matter: prompts have up to 60 tokens, scores and logits sizes around one.
SETTINGS = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
TINY = Tiny(
    Gemma2Config,
    Gemma2ForCausalLM,
    SETTINGS,
    {
        "no-soft-caps": NO_CAPS,
        "windows-by-name": {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]
        },
        "nothing-but-scores": {
            **NO_CAPS,
            "query_pre_attn_scalar": 16,
            "layer_types": ["full_attention"] * 3,
        },
        "own-head": {"tie_word_embeddings": False},
        "biases": {"attention_bias": True},
        "silu": {"hidden_activation": "silu"},
    },
)


class TestGemma2(FamilyTests):
    tiny = TINY


def test_a_layer_without_anything_of_its_own_scores_as_others_do() -> None:
    config = config_of(TINY, **NO_CAPS, query_pre_attn_scalar=16)
    assert isinstance(config, gemma2.Gemma2Config)
    assert [gemma2.scoring(config, i) is CAUSAL for i in range(3)] == [False, True, False]


def test_a_cap_that_is_left_out_is_the_usual_one() -> None:
    config = config_of(TINY, attn_logit_softcapping="absent", final_logit_softcapping="absent")
    assert isinstance(config, gemma2.Gemma2Config)
    assert (config.score_softcap, config.logit_softcap) == (50.0, 30.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must be 3 times"),
        ({"layer_types": [{}] * 3}, "layer_types must be 3 times"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"hidden_activation": "relu6"}, "hidden_activation 'relu6' is not supported"),
        ({"sliding_window": 0}, "sliding_window must be an integer"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        config_of(TINY, **changes)
