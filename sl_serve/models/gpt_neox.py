"""GPT-NeoX and Pythia: LayerNorm, one projection for each head's query, key and value, rotary
positions in a part of each head, MLP beside attention or after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, StaticTensors, llama
from sl_serve.models.parts import (
    activation_name,
    add_mlp,
    final_layer_norm,
    heads_in_order,
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
from sl_serve.weights.gguf_dialect import GgufDialect, grouped_rows
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

TOP = "gpt_neox."
PREFIX = TOP + "layers.{layer}."

hidden_states, head_input = llama.hidden_states, final_layer_norm


GGUF = GgufDialect(
    "gptneox",
    {"use_parallel_residual": "use_parallel_residual"},
    rotary_share="rotary_pct",
    rows={"query_key_value": grouped_rows},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTNeoXConfig(ModelConfig):
    activation: str
    parallel: bool  # the MLP sees what attention sees, not what it made


def model_config(fields: Fields, generation: Fields) -> GPTNeoXConfig:
    fields = fields.or_else(
        {
            "rope_theta": fields.get("rotary_emb_base"),
            "partial_rotary_factor": fields.number("rotary_pct", 0.25),
        }
    ).with_values({"num_key_value_heads": None})
    return GPTNeoXConfig(
        **decoder_fields(fields, generation) | {"norm_eps": fields.number("layer_norm_eps", 1e-5)},
        attention_bias=fields.boolean("attention_bias", True),
        mlp_bias=True,
        activation=activation_name(fields, "hidden_act", "gelu"),
        parallel=fields.boolean("use_parallel_residual", True),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.attention_bias
    attn, mlp = PREFIX + "attention.", PREFIX + "mlp."
    return (
        *layer_norm_params("attention_norm", PREFIX + "input_layernorm", hidden),
        *linear_params("qkv", hidden, {attn + "query_key_value": 3 * hidden}, bias),
        *linear_params("o", hidden, {attn + "dense": hidden}, bias),
        *layer_norm_params("mlp_norm", PREFIX + "post_attention_layernorm", hidden),
        *linear_params("fc1", hidden, {mlp + "dense_h_to_4h": inner}, config.mlp_bias),
        *linear_params("fc2", inner, {mlp + "dense_4h_to_h": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    return {
        **vocabulary_tensors(config, TOP + "embed_in"),
        **layer_norm_tensors("final_norm", TOP + "final_layer_norm", config.hidden_size),
    }


def block(
    config: GPTNeoXConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    heads = heads_in_order(linear(ops, "qkv", h, w), config.n_kv_heads, config.head_dim)
    ops.rope_(heads[:, : config.n_heads + config.n_kv_heads], *ropes[0])
    attended = yield new_tokens_of(config, heads)
    h = mlp_input(ops, x, attended, w, config.norm_eps, config.parallel)
    add_mlp(ops, config.activation, x, h, w)
