from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from sl_serve.errors import ModelError
from sl_serve.models import falcon
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


def test_slopes_are_rounded_as_transformers_rounds_them() -> None:
    """Those of 32 heads are no powers of two, as those of the tiny models are."""
    theirs = build_alibi_tensor(torch.ones(1, 2), 32, torch.float32)[:, 0, 1]
    ours = falcon.alibi_scoring(32, 64, torch.device("cpu")).slopes
    assert ours is not None
    torch.testing.assert_close(ours, theirs / 8, rtol=1e-6, atol=0)
