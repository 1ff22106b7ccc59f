from __future__ import annotations

import pytest
from transformers import BloomConfig, BloomForCausalLM

from sl_serve.errors import ModelError
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

TINY = Tiny(
    BloomConfig,
    BloomForCausalLM,
    variants={
        "six-heads": {"hidden_size": 72, "num_attention_heads": 6},
        "own-head": {"tie_word_embeddings": False},
    },
)


class TestBloom(FamilyTests):
    tiny = TINY


def test_names_of_older_folders() -> None:
    renamed = config_of(
        TINY, hidden_size="absent", n_embed=64, max_position_embeddings="absent", seq_length=512
    )
    assert (renamed.hidden_size, renamed.max_positions) == (64, 512)


def test_another_residual_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="apply_residual_connection_post_layernorm True"):
        config_of(TINY, apply_residual_connection_post_layernorm=True)
