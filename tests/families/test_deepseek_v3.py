from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from sl_serve.config import KVDTypeName
from sl_serve.device import SimDevice
from sl_serve.loader import Parts
from tests.engine.running import GREEDY, config, engine, random_prompts, requests_for
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


@pytest.mark.parametrize(("kv_dtype", "line_bytes"), [("auto", 4 * 40), ("int8", 2 * 34)])
def test_one_line_of_a_token_is_kept(
    kv_dtype: KVDTypeName, line_bytes: int, tmp_path: Path
) -> None:
    """A latent of 32 numbers and a rotated part of 8, in memory and over a link."""
    TINY.write(tmp_path)
    prompts = random_prompts(5)
    settings = replace(config(max_rows=4, n_sub_batches=2), kv_dtype=kv_dtype)

    def check(parts: Parts) -> None:
        assert parts.plan.kv.token_layer_bytes == line_bytes

    found = []
    for device in (None, SimDevice()):
        with engine(tmp_path, settings, device, check) as running:
            requests, answers = requests_for(prompts, GREEDY)
            running.submit(requests)
            found.append(answers.wait())
    assert found[0] == found[1]
