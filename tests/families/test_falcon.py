from __future__ import annotations

from typing import Any

import pytest
from transformers import FalconConfig, FalconForCausalLM

from sl_serve.errors import ModelError
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
TINY = Tiny(
    FalconConfig,
    FalconForCausalLM,
    variants={
        "grouped": GROUPED,
        "grouped-one-norm": {**GROUPED, "num_ln_in_parallel_attn": 1},
        "grouped-biases": {**GROUPED, "bias": True},
        "many-key-heads": {"multi_query": False},
        "sequential": {"parallel_attn": False},
        "alibi": RW,
        "alibi-six-heads": {**RW, "hidden_size": 72, "num_attention_heads": 6},
        "alibi-one-key-head": {"alibi": True},
        "narrow-mlp": {"ffn_hidden_size": 96},
        "own-head": {"tie_word_embeddings": False},
        "relu": {"activation": "relu"},
        "scaled-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    },
)


class TestFalcon(FamilyTests):
    tiny = TINY


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({**GROUPED, "parallel_attn": False}, "parallel_attn False is not supported"),
        ({**GROUPED, "num_kv_heads": 3}, "4 heads cannot share 3 key and value heads"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 is not supported"),
        ({"activation": "sinus"}, "activation 'sinus' is not supported"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        config_of(TINY, **changes)
