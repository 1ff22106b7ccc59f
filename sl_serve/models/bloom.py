"""BLOOM: ALiBi, a norm after the embedding, LayerNorm, one projection for each head's query, key
and value, biases everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, StaticTensors
from sl_serve.models.parts import (
    add_mlp,
    alibi_slopes,
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
from sl_serve.ops import Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect, grouped_rows
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

TOP = "transformer."
PREFIX = TOP + "h.{layer}."

head_input = final_layer_norm


GGUF = GgufDialect(
    "bloom",
    {"attention.layer_norm_epsilon": "layer_norm_epsilon"},
    rows={"query_key_value": grouped_rows},
)


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    fields.only("apply_residual_connection_post_layernorm", False)
    fields = fields.or_else(
        {
            "hidden_size": fields.get("n_embed"),
            "num_hidden_layers": fields.get("n_layer"),
            "num_attention_heads": fields.get("n_head"),
            # What it was trained with; ALiBi sets no limit.
            "max_position_embeddings": fields.integer("seq_length", 2048),
            "tie_word_embeddings": True,
        }
    )
    inner_size = 4 * fields.integer("hidden_size")
    sizes = {"intermediate_size": inner_size, "num_key_value_heads": None}
    settings = decoder_fields(fields.with_values(sizes), generation) | {
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "ropes": (),
    }
    return ModelConfig(**settings, attention_bias=True, mlp_bias=True)


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    attn, mlp, bias = PREFIX + "self_attention.", PREFIX + "mlp.", config.attention_bias
    return (
        *layer_norm_params("attention_norm", PREFIX + "input_layernorm", hidden),
        *linear_params("qkv", hidden, {attn + "query_key_value": 3 * hidden}, bias),
        *linear_params("o", hidden, {attn + "dense": hidden}, bias),
        *layer_norm_params("mlp_norm", PREFIX + "post_attention_layernorm", hidden),
        *linear_params("fc1", hidden, {mlp + "dense_h_to_4h": inner}, config.mlp_bias),
        *linear_params("fc2", inner, {mlp + "dense_4h_to_h": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    embedding = TOP + "word_embeddings"
    return {
        **vocabulary_tensors(config, embedding),
        **layer_norm_tensors("embed_norm", embedding + "_layernorm", config.hidden_size),
        **layer_norm_tensors("final_norm", TOP + "ln_f", config.hidden_size),
    }


def hidden_states(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    return layer_norm(ops, "embed_norm", tokens, w, config.norm_eps)


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    heads = heads_in_order(linear(ops, "qkv", h, w), config.n_kv_heads, config.head_dim)
    scoring = Scoring(slopes=alibi_slopes(config.n_heads, x.device))
    attended = yield new_tokens_of(config, heads, scoring)
    h = mlp_input(ops, x, attended, w, config.norm_eps, parallel=False)
    add_mlp(ops, "gelu_pytorch_tanh", x, h, w)
