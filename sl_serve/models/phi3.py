"""Phi 3, 3.5 and 4: Llama with fused projections, heads that may turn in part, rotation by the
length a text will have, and a window over the last tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import Block, RopeTable
from sl_serve.models.llama import (
    PREFIX,
    head_input,
    hidden_states,
    new_tokens,
    second_half,
    static_tensors,
)
from sl_serve.models.parts import WindowedConfig, linear_params, vector_param
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.hf_windows import sliding_window
from sl_serve.weights.layout import LayerWeights, Param

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect("phi3", rotary_share="partial_rotary_factor")


def model_config(fields: Fields, generation: Fields) -> WindowedConfig:
    fields = fields.with_defaults(
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
    )
    fields.only("hidden_act", "silu")
    decoder = decoder_fields(fields, generation)
    kind = decoder["ropes"][0].kind
    if kind not in ("default", "longrope"):
        raise ModelError(f"{fields.source}: Phi 3 has no rotary scaling {kind!r}, only longrope")
    return WindowedConfig(**decoder, windows=(sliding_window(fields),) * decoder["n_layers"])


def layer_params(config: WindowedConfig) -> tuple[Param, ...]:
    hidden, attn = config.hidden_size, PREFIX + "self_attn."
    n_qkv = config.q_size + 2 * config.kv_size
    return (
        vector_param("input_norm", PREFIX + "input_layernorm.weight", hidden),
        *linear_params("qkv", hidden, {attn + "qkv_proj": n_qkv}, bias=False),
        *linear_params("o", config.q_size, {attn + "o_proj": hidden}, bias=False),
        vector_param("post_norm", PREFIX + "post_attention_layernorm.weight", hidden),
        *mlp_params(config),
    )


def mlp_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner, mlp = config.hidden_size, config.intermediate_size, PREFIX + "mlp."
    return (
        *linear_params("gate_up", hidden, {mlp + "gate_up_proj": 2 * inner}, bias=False),
        *linear_params("down", inner, {mlp + "down_proj": hidden}, bias=False),
    )


def block(
    config: WindowedConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    attended = yield new_tokens(config, ops, w, x, ropes[0], config.scoring(layer))
    second_half(config, ops, w, x, attended)
