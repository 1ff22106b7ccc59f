"""Seed-OSS: Llama whose biases on queries, keys and values come without one on what attention
gives."""

from __future__ import annotations

from dataclasses import dataclass

from sl_serve.config import ModelConfig
from sl_serve.models.llama import (
    block,
    decoder_params,
    head_input,
    hidden_states,
    static_tensors,
)
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import Param

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect(
    "seed_oss",
    derived=lambda _fields, tensors: {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in tensors,
    },
)


@dataclass(frozen=True, slots=True)
class SeedOssConfig(ModelConfig):
    attention_out_bias: bool = False


def model_config(fields: Fields, generation: Fields) -> SeedOssConfig:
    fields = fields.with_defaults(head_dim=128, max_position_embeddings=524288)
    fields.only("hidden_act", "silu")
    return SeedOssConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", True),
        attention_out_bias=fields.boolean("attention_out_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def layer_params(config: SeedOssConfig) -> tuple[Param, ...]:
    return decoder_params(config, config.attention_bias, config.attention_out_bias)
