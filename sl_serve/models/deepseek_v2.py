"""DeepSeek-V2 (arXiv 2405.04434): as the third, but experts are chosen by a softmax over all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import Block, RopeTable
from sl_serve.models.deepseek_gguf import SOFTMAX, deepseek_dialect
from sl_serve.models.deepseek_v3 import (
    DeepseekConfig,
    expert,
    head_input,
    hidden_states,
    latent_block,
    latent_fields,
    layer_params,
    of_best_groups,
    static_tensors,
)
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.layout import LayerWeights

__all__ = [
    "block",
    "expert",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

METHODS = ("greedy", "group_limited_greedy")

GGUF = deepseek_dialect(
    SOFTMAX, lambda fields, _tensors: {"topk_method": METHODS[fields["n_group"] > 1]}
)


def model_config(fields: Fields, generation: Fields) -> DeepseekConfig:
    fields.only("scoring_func", "softmax")
    fields.only("norm_topk_prob", False)
    fields.only("mlp_bias", False)
    method = fields.text("topk_method", METHODS[0])
    if method not in METHODS:
        raise ModelError(
            f"{fields.source}: topk_method {method[:40]!r} is not supported ({', '.join(METHODS)})"
        )
    has_groups = method == METHODS[1]
    return DeepseekConfig(
        **latent_fields(fields, generation),
        n_dense_layers=fields.integer("first_k_dense_replace", 0, low=0),
        n_groups=fields.integer("n_group") if has_groups else 1,
        groups_per_token=fields.integer("topk_group") if has_groups else 1,
        corrects=False,
        sum_to_one=False,
        routed_scale=fields.number("routed_scaling_factor", 1.0),
    )


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    return latent_block(config, ops, w, x, ropes[0], choice)


def choice(
    config: DeepseekConfig, logits: torch.Tensor, w: LayerWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and their weights, (T, n) each, of logits (T, experts): the best of the groups whose
    best are best."""
    scores = of_best_groups(config, logits.float().softmax(-1), n_counted=1)
    weights, experts = scores.topk(config.experts_per_token)
    return experts, weights * config.routed_scale
