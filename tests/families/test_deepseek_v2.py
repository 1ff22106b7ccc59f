from __future__ import annotations

from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from tests.families.experts import joined_expert
from tests.families.harness import FamilyTests, Tiny
from tests.families.test_deepseek_v3 import YARN

TINY = Tiny(
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    {
        "latent-queries": {"q_lora_rank": 32},
        "groups": {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
        "yarn-rope": {"rope_parameters": YARN},
        "even-yarn-rope": {"rope_parameters": {**YARN, "mscale_all_dim": 0.707}},
        "biases": {"attention_bias": True},
    },
)


class TestDeepseekV2(FamilyTests):
    tiny = TINY
    find = staticmethod(joined_expert)
