"""DeepSeek's second and third generation in GGUF files, which give both one architecture.

Older files have attention's kv_b as it is. Newer ones have what makes keys of a latent, of each
head transposed, and what makes values, apart; their sizes of heads are those of the lines that are
kept, and the heads' own have names with "mla".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import Derived, GgufDialect, Split

GATING = "deepseek2.expert_gating_func"
SOFTMAX, SIGMOID = 1, 2
# Older files do not say that experts are in groups: their number -> how many groups, and how many
# of them a token's experts are of (config.json of DeepSeek-V2, -Coder-V2, -V3 and -R1).
GROUPS = {160: (8, 3), 256: (8, 4)}
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"


def deepseek_dialect(gating: int, derived: Derived = lambda _fields, _tensors: {}) -> GgufDialect:
    return GgufDialect(
        "deepseek2",
        {
            "attention.q_lora_rank": "q_lora_rank",
            "expert_count": "n_routed_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "n_shared_experts",
            "expert_used_count": "num_experts_per_tok",
        },
        derived=derived,
        has_experts=True,
        belongs=lambda settings, _tensors: settings.get(GATING, SOFTMAX) == gating,
        read=_read,
        read_apart=(
            *("attention.kv_lora_rank", "attention.value_length", "rope.dimension_count"),
            *("attention.key_length_mla", "attention.value_length_mla", LOG_MULTIPLIER),
            *("expert_gating_func", "expert_group_count", "expert_group_used_count"),
            *("expert_weights_norm", "expert_weights_scale", "leading_dense_block_count"),
        ),
        splits={"kv_b_proj": Split(_kv_b_parts, _kv_b)},
    )


def _read(settings: Fields, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is absent is as llama.cpp takes it then."""
    rope_dim = settings.integer("rope.dimension_count")
    key = settings.integer("attention.key_length_mla", settings.integer("attention.key_length"))
    value = settings.integer(
        "attention.value_length_mla", settings.integer("attention.value_length")
    )
    n_groups, groups_used = GROUPS.get(settings.integer("expert_count"), (1, 1))
    return {
        "head_dim": rope_dim,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key - rope_dim,
        "v_head_dim": value,
        "kv_lora_rank": settings.integer("attention.kv_lora_rank"),
        "first_k_dense_replace": settings.integer("leading_dense_block_count", 0, low=0),
        "n_group": settings.integer("expert_group_count", n_groups),
        "topk_group": settings.integer("expert_group_used_count", groups_used),
        "norm_topk_prob": settings.boolean("expert_weights_norm", False),
        "routed_scaling_factor": settings.number("expert_weights_scale", 1.0),
        **_amplitudes(settings, fields.get("rope_scaling", {})),
    }


def _amplitudes(settings: Fields, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's two scales are one number in the file, a tenth of it: they are the same in all models
    that have them."""
    if scaling.get("rope_type") != "yarn":
        settings.only(LOG_MULTIPLIER, 0.0)
    value = settings.get(LOG_MULTIPLIER)
    if value is None or (isinstance(value, float) and value == 0):
        return {}
    scale = round(10 * settings.number(LOG_MULTIPLIER), 6)  # there as float32
    return {"rope_scaling": {**scaling, "mscale": scale, "mscale_all_dim": scale}}


def _kv_b_parts(config: Any) -> dict[str, tuple[int, ...]]:
    """`config`: a DeepseekConfig."""
    return {
        "k_b_proj": (config.n_heads, config.kv_rank, config.nope_dim),
        "v_b_proj": (config.n_heads, config.v_dim, config.kv_rank),
    }


def _kv_b(k_b: torch.Tensor, v_b: torch.Tensor) -> torch.Tensor:
    return torch.cat([k_b.transpose(1, 2), v_b], dim=1).flatten(0, 1)
