from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from sl_serve.config import RopeConfig
from sl_serve.errors import ModelError
from sl_serve.models import gemma2
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

# Two layers with windows of 8 tokens, with one between that sees all 60.
SETTINGS = {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}
SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
TINY = Tiny(
    Gemma3TextConfig,
    Gemma3ForCausalLM,
    SETTINGS,
    {
        "usual-scale": {"query_pre_attn_scalar": 16},
        "scaled-rope": {"rope_parameters": SCALED},
        "windows-by-name": {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"]
        },
        "soft-cap": {"final_logit_softcapping": 3.0},
        "own-head": {"tie_word_embeddings": False},
        "biases": {"attention_bias": True},
    },
)


class TestGemma3Text(FamilyTests):
    tiny = TINY


def test_the_rotations_of_older_folders() -> None:
    config = config_of(
        TINY,
        rope_parameters="absent",
        rope_theta=1e5,
        rope_local_base_freq=300.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert config.ropes == (RopeConfig(300.0), RopeConfig(1e5, "linear", 8.0))


def test_the_window_pattern_of_older_folders() -> None:
    config = config_of(TINY, layer_types="absent", sliding_window_pattern=3)
    assert isinstance(config, gemma2.Gemma2Config)
    assert config.windowed == (True, True, False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters must be those of"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        config_of(TINY, **changes)
