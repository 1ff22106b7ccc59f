from __future__ import annotations

from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from tests.families.experts import joined_expert
from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    {
        "sums-to-one": {"norm_topk_prob": True},
        "dense-layers": {"mlp_only_layers": [1]},
        "no-biases": {"qkv_bias": False},
    },
)


class TestQwen2Moe(FamilyTests):
    tiny = TINY
    find = staticmethod(joined_expert)
