from __future__ import annotations

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.families.experts import joined_expert
from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16},
    {
        "sums-to-one": {"norm_topk_prob": True},
        "every-other-layer": {"decoder_sparse_step": 2},
        "dense-layers": {"mlp_only_layers": [0, 2]},
        "window": {"use_sliding_window": True, "sliding_window": 5},
        "biases": {"attention_bias": True},
        "other-heads": {"head_dim": 24},
    },
)


class TestQwen3Moe(FamilyTests):
    tiny = TINY
    find = staticmethod(joined_expert)
