from __future__ import annotations

import pytest
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from sl_serve.errors import ModelError
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

TINY = Tiny(
    Starcoder2Config,
    Starcoder2ForCausalLM,
    variants={
        "window": {"sliding_window": 8},
        "no-biases": {"use_bias": False},
        "own-head": {"tie_word_embeddings": False},
        "scaled-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "relu": {"hidden_act": "relu"},
    },
)


class TestStarcoder2(FamilyTests):
    tiny = TINY


def test_another_mlp_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="mlp_type 'gated' is not supported"):
        config_of(TINY, mlp_type="gated")
