"""StarCoder 2: rotary positions and grouped queries with LayerNorm, biases and a plain MLP, and a
window over the last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.models import Block, RopeTable, StaticTensors, llama
from sl_serve.models.llama import PREFIX, all_heads, attention_params, hidden_states, rotated
from sl_serve.models.parts import (
    ACTIVATIONS,
    WindowedConfig,
    activation_name,
    add_linear,
    layer_norm,
    layer_norm_params,
    linear,
    linear_params,
)
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

GGUF = GgufDialect(
    "starcoder2",
    {"attention.layer_norm_epsilon": "norm_epsilon"},
    derived=lambda fields, _tensors: {"use_bias": fields["attention_bias"]},
)


@dataclass(frozen=True, slots=True)
class StarCoder2Config(WindowedConfig):
    activation: str = "gelu_pytorch_tanh"


def model_config(fields: Fields, generation: Fields) -> StarCoder2Config:
    fields = fields.with_defaults(tie_word_embeddings=True, max_position_embeddings=4096)
    decoder = decoder_fields(fields, generation)
    has_biases = fields.boolean("use_bias", True)
    return StarCoder2Config(
        **decoder | {"norm_eps": fields.number("norm_epsilon", 1e-5)},
        attention_bias=has_biases,
        mlp_bias=has_biases,
        windows=(sliding_window(fields),) * decoder["n_layers"],
        activation=activation_name(fields, "hidden_act", "gelu_pytorch_tanh"),
    )


def layer_params(config: StarCoder2Config) -> tuple[Param, ...]:
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    return (
        *layer_norm_params("input_norm", PREFIX + "input_layernorm", hidden),
        *attention_params(config, config.attention_bias, config.attention_bias),
        *layer_norm_params("post_norm", PREFIX + "post_attention_layernorm", hidden),
        *linear_params("up", hidden, {PREFIX + "mlp.c_fc": inner}, bias),
        *linear_params("down", inner, {PREFIX + "mlp.c_proj": hidden}, bias),
    )


def static_tensors(config: StarCoder2Config) -> StaticTensors:
    final_norm_bias = ("model.norm.bias", (config.hidden_size,))
    return llama.static_tensors(config) | {"final_norm_bias": final_norm_bias}


def block(
    config: StarCoder2Config,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "input_norm", x, w, config.norm_eps)
    heads = all_heads(config, ops, w, h)
    attended = yield rotated(config, ops, heads, ropes[0], config.scoring(layer))
    add_linear(ops, "o", x, attended, w)
    h = layer_norm(ops, "post_norm", x, w, config.norm_eps)
    h = ACTIVATIONS[config.activation](linear(ops, "up", h, w))
    add_linear(ops, "down", x, h, w)


def head_input(
    config: StarCoder2Config, ops: Ops, w: LayerWeights, x: torch.Tensor
) -> torch.Tensor:
    return layer_norm(ops, "final_norm", x, w, config.norm_eps)
