from __future__ import annotations

from transformers import OPTConfig, OPTForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    OPTConfig,
    OPTForCausalLM,
    {"ffn_dim": 96, "init_std": 0.2, "word_embed_proj_dim": 64},
    {
        "norms-after": {"do_layer_norm_before": False},
        "no-final-norm": {"_remove_final_layer_norm": True},
        "narrow-embedding": {"word_embed_proj_dim": 32},
        "own-head": {"tie_word_embeddings": False},
        "no-biases": {"enable_bias": False},
        "odd-heads": {"hidden_size": 60, "word_embed_proj_dim": 60},
    },
)


class TestOpt(FamilyTests):
    tiny = TINY
