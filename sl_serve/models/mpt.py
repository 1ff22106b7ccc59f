"""MPT: ALiBi, LayerNorm without biases, no biases anywhere, GELU."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import Block, RopeTable, StaticTensors, llama
from sl_serve.models.parts import (
    add_mlp,
    alibi_slopes,
    final_layer_norm,
    layer_norm,
    layer_norm_params,
    linear,
    linear_params,
    mlp_input,
    new_tokens_of,
    vocabulary_tensors,
)
from sl_serve.ops import Ops, Scoring
from sl_serve.weights.fields import Fields, shown
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

TOP = "transformer."
PREFIX = TOP + "blocks.{layer}."

hidden_states, head_input = llama.hidden_states, final_layer_norm


def _attention(fields: Mapping[str, Any], _tensors: Collection[str]) -> Mapping[str, Any]:
    n_heads, bias = fields["num_attention_heads"], fields.get("alibi_bias_max")
    shares_keys = fields.get("num_key_value_heads", n_heads) != n_heads
    attention = {
        "attn_type": "grouped_query_attention" if shares_keys else "multihead_attention",
        "alibi": bool(bias),
        "alibi_bias_max": bias,
        "clip_qkv": fields.get("clip_qkv"),
    }
    return {"attn_config": attention}


GGUF = GgufDialect(
    "mpt",
    {
        "attention.clamp_kqv": "clip_qkv",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.max_alibi_bias": "alibi_bias_max",
    },
    derived=_attention,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MptConfig(ModelConfig):
    score_scale: float | None  # None: 1/sqrt(head_dim)
    qkv_limit: float | None  # of the size of queries, keys and values


def model_config(fields: Fields, generation: Fields) -> MptConfig:
    for key, value in ("expansion_ratio", 4), ("no_bias", True), ("logit_scale", None):
        fields.only(key, value)
    fields.only("norm_type", "low_precision_layernorm")
    attention = _attention_fields(fields)
    fields = fields.or_else(
        {
            "hidden_size": fields.get("d_model"),
            "num_hidden_layers": fields.get("n_layers"),
            "num_attention_heads": fields.get("n_heads"),
            "max_position_embeddings": fields.get("max_seq_len"),
            "tie_word_embeddings": True,
        }
    )
    inner_size = 4 * fields.integer("hidden_size")
    sizes = {"intermediate_size": inner_size, "num_key_value_heads": None}
    settings = decoder_fields(fields.with_values(sizes), generation) | {
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "ropes": (),
    }
    return MptConfig(
        **settings,
        score_scale=attention.number("softmax_scale") if "softmax_scale" in attention else None,
        qkv_limit=attention.number("clip_qkv") if "clip_qkv" in attention else None,
    )


def _attention_fields(fields: Fields) -> Fields:
    given = fields.get("attn_config") or {}
    if not isinstance(given, dict):
        raise ModelError(f"{fields.source}: attn_config must be an object, not {shown(given)}")
    attention = Fields(given, f"{fields.source}: attn_config")
    attention.only("attn_type", "multihead_attention")
    attention.only("alibi", True)
    attention.only("alibi_bias_max", 8)
    attention.only("prefix_lm", False)
    attention.only("qk_ln", False)
    return attention


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    attn, mlp = PREFIX + "attn.", PREFIX + "ffn."
    return (
        *layer_norm_params("attention_norm", PREFIX + "norm_1", hidden, False),
        *linear_params("qkv", hidden, {attn + "Wqkv": 3 * hidden}, False),
        *linear_params("o", hidden, {attn + "out_proj": hidden}, False),
        *layer_norm_params("mlp_norm", PREFIX + "norm_2", hidden, False),
        *linear_params("fc1", hidden, {mlp + "up_proj": inner}, False),
        *linear_params("fc2", inner, {mlp + "down_proj": hidden}, False),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    return {
        **vocabulary_tensors(config, TOP + "wte"),
        "final_norm": (TOP + "norm_f.weight", (config.hidden_size,)),
    }


def block(
    config: MptConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    qkv = linear(ops, "qkv", h, w)
    if config.qkv_limit is not None:
        qkv.clamp_(-config.qkv_limit, config.qkv_limit)
    heads = qkv.view(len(h), -1, config.head_dim)
    scoring = Scoring(config.score_scale, slopes=alibi_slopes(config.n_heads, x.device))
    attended = yield new_tokens_of(config, heads, scoring)
    h = mlp_input(ops, x, attended, w, config.norm_eps, parallel=False)
    add_mlp(ops, "gelu", x, h, w)
