"""StarCoder2: grouped queries, rotary positions, LayerNorm, biases, and a window in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, StaticTensors, llama
from sl_serve.models.parts import (
    WindowedConfig,
    activation_name,
    add_mlp,
    final_layer_norm,
    layer_norm,
    layer_norm_params,
    layer_norm_tensors,
    linear,
    linear_params,
    mlp_input,
    new_tokens_of,
    vocabulary_tensors,
)
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.hf_windows import sliding_window
from sl_serve.weights.layout import LayerWeights, Param

PREFIX = "model.layers.{layer}."

hidden_states, head_input = llama.hidden_states, final_layer_norm


GGUF = GgufDialect(
    "starcoder2",
    {"attention.layer_norm_epsilon": "norm_epsilon"},
    derived=lambda fields, _tensors: {"use_bias": fields["attention_bias"]},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Starcoder2Config(WindowedConfig):
    activation: str


def model_config(fields: Fields, generation: Fields) -> Starcoder2Config:
    fields.only("mlp_type", "default")
    fields.only("norm_type", "layer_norm")
    fields = fields.with_defaults(tie_word_embeddings=True, max_position_embeddings=4096)
    has_biases = fields.boolean("use_bias", True)
    settings = decoder_fields(fields, generation) | {
        "norm_eps": fields.number("norm_epsilon", 1e-5),
    }
    return Starcoder2Config(
        **settings,
        attention_bias=has_biases,
        mlp_bias=has_biases,
        activation=activation_name(fields, "hidden_act", "gelu_pytorch_tanh"),
        windows=(sliding_window(fields),) * settings["n_layers"],
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    attn, mlp, bias = PREFIX + "self_attn.", PREFIX + "mlp.", config.attention_bias
    qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    qkv = {attn + name: size for name, size in qkv.items()}
    return (
        *layer_norm_params("attention_norm", PREFIX + "input_layernorm", hidden),
        *linear_params("qkv", hidden, qkv, bias),
        *linear_params("o", config.q_size, {attn + "o_proj": hidden}, bias),
        *layer_norm_params("mlp_norm", PREFIX + "post_attention_layernorm", hidden),
        *linear_params("fc1", hidden, {mlp + "c_fc": inner}, config.mlp_bias),
        *linear_params("fc2", inner, {mlp + "c_proj": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    return {
        **vocabulary_tensors(config, "model.embed_tokens"),
        **layer_norm_tensors("final_norm", "model.norm", config.hidden_size),
    }


def block(
    config: Starcoder2Config,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    heads = linear(ops, "qkv", h, w).view(len(h), -1, config.head_dim)
    ops.rope_(heads[:, : config.n_heads + config.n_kv_heads], *ropes[0])
    attended = yield new_tokens_of(config, heads, config.scoring(layer))
    h = mlp_input(ops, x, attended, w, config.norm_eps, parallel=False)
    add_mlp(ops, config.activation, x, h, w)
