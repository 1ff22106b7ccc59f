"""Falcon: one key head (7b), or several whose queries, key and value come from one projection (40b,
180b, 11B), MLP beside attention with one norm or two; ALiBi and an MLP after attention (rw)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, StaticTensors, llama
from sl_serve.models.parts import (
    activation_name,
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
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect, grouped_rows
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

TOP = "transformer."
PREFIX = TOP + "h.{layer}."

hidden_states, head_input = llama.hidden_states, final_layer_norm


def _architecture(fields: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
    """7b has one key head, rw as many as queries; those between are of the new architecture."""
    n_kv_heads = fields["num_kv_heads"]
    is_new = 1 < n_kv_heads < fields["num_attention_heads"]
    n_norms = 2 if "blk.0.attn_norm_2.weight" in tensors else 1
    return {
        "bias": fields["attention_bias"],
        "multi_query": n_kv_heads == 1,
        "new_decoder_architecture": is_new,
        **({"num_ln_in_parallel_attn": n_norms} if is_new else {}),
    }


GGUF = GgufDialect(
    "falcon",
    {
        "attention.head_count_kv": "num_kv_heads",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "feed_forward_length": "ffn_hidden_size",
    },
    derived=_architecture,
    rows={"query_key_value": grouped_rows},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FalconConfig(ModelConfig):
    activation: str
    alibi: bool
    parallel: bool  # the MLP sees what attention sees, not what it made
    two_norms: bool  # in parallel: one for attention, one for the MLP


def model_config(fields: Fields, generation: Fields) -> FalconConfig:
    fields = fields.or_else({"hidden_size": fields.get("n_embed"), "tie_word_embeddings": True})
    inner_size = fields.integer("ffn_hidden_size", 4 * fields.integer("hidden_size"))
    sizes = {"intermediate_size": inner_size, "num_key_value_heads": _n_kv_heads(fields)}
    settings = decoder_fields(fields.with_values(sizes), generation)
    settings["norm_eps"] = fields.number("layer_norm_epsilon", 1e-5)
    alibi, has_biases = fields.boolean("alibi", False), fields.boolean("bias", False)
    if alibi:
        settings["ropes"] = ()
    return FalconConfig(
        **settings,
        attention_bias=has_biases,
        mlp_bias=has_biases,
        activation=activation_name(fields, "activation", "gelu"),
        alibi=alibi,
        parallel=fields.boolean("parallel_attn", True),
        two_norms=_has_two_norms(fields),
    )


def _n_kv_heads(fields: Fields) -> int:
    n_heads = fields.integer("num_attention_heads")
    if fields.boolean("new_decoder_architecture", False):
        return fields.integer("num_kv_heads", n_heads)
    return 1 if fields.boolean("multi_query", True) else n_heads


def _has_two_norms(fields: Fields) -> bool:
    if fields.boolean("new_decoder_architecture", False):
        fields.only("parallel_attn", True)
        return fields.integer("num_ln_in_parallel_attn", 2, high=2) == 2
    fields.only("num_ln_in_parallel_attn", 1)
    return False


def layer_params(config: FalconConfig) -> tuple[Param, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    attn, mlp, bias = PREFIX + "self_attention.", PREFIX + "mlp.", config.attention_bias
    qkv = {attn + "query_key_value": config.q_size + 2 * config.kv_size}
    first, second = ("ln_attn", "ln_mlp") if config.two_norms else ("input_layernorm", "")
    if not config.parallel:
        second = "post_attention_layernorm"
    return (
        *layer_norm_params("attention_norm", PREFIX + first, hidden),
        *linear_params("qkv", hidden, qkv, bias),
        *linear_params("o", hidden, {attn + "dense": hidden}, bias),
        *(layer_norm_params("mlp_norm", PREFIX + second, hidden) if second else ()),
        *linear_params("fc1", hidden, {mlp + "dense_h_to_4h": inner}, config.mlp_bias),
        *linear_params("fc2", inner, {mlp + "dense_4h_to_h": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    return {
        **vocabulary_tensors(config, TOP + "word_embeddings"),
        **layer_norm_tensors("final_norm", TOP + "ln_f", config.hidden_size),
    }


def block(
    config: FalconConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    heads = heads_in_order(linear(ops, "qkv", h, w), config.n_kv_heads, config.head_dim)
    for rope in ropes:
        ops.rope_(heads[:, : config.n_heads + config.n_kv_heads], *rope)
    scoring = alibi_scoring(config.n_heads, config.head_dim, x.device) if config.alibi else CAUSAL
    attended = yield new_tokens_of(config, heads, scoring)
    h = mlp_input(ops, x, attended, w, config.norm_eps, config.parallel)
    add_mlp(ops, config.activation, x, h, w)


@cache
def alibi_scoring(n_heads: int, head_dim: int, device: torch.device) -> Scoring:
    """Falcon's slopes are bfloat16, whatever is computed in, and scaled as products are."""
    slopes = alibi_slopes(n_heads, device).bfloat16().float()
    return Scoring(slopes=slopes * head_dim**-0.5)
