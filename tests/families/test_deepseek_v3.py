from __future__ import annotations

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.families.experts import joined_expert
from tests.families.harness import FamilyTests, Tiny

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}

TINY = Tiny(
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    {
        "whole-queries": {"q_lora_rank": None},
        "halves-turn": {"rope_interleave": False},
        "yarn-rope": {"rope_parameters": YARN},
        "even-yarn-rope": {"rope_parameters": {**YARN, "mscale": 1.0}},
        "one-group": {"n_group": 1, "topk_group": 1},
        "two-shared": {"n_shared_experts": 2, "routed_scaling_factor": 1.3},
        "as-they-are": {"norm_topk_prob": False},
        "biases": {"attention_bias": True},
        "no-dense": {"first_k_dense_replace": 0},
    },
)


class TestDeepseekV3(FamilyTests):
    tiny = TINY
    find = staticmethod(joined_expert)
