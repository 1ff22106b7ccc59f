"""Gemma 1: the tensors of Llama, scaled embeddings, norms that multiply by 1 + weight, GELU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, llama
from sl_serve.models.parts import activation_name, add_linear, gated, linear, new_tokens_of
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights

PREFIX = llama.PREFIX
ACTIVATION = "gelu_pytorch_tanh"
DEFAULTS = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}

layer_params, static_tensors = llama.layer_params, llama.static_tensors


GGUF = GgufDialect("gemma", norm_offset=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig(ModelConfig):
    activation: str


def model_config(fields: Fields, generation: Fields) -> GemmaConfig:
    fields.only("use_bidirectional_attention", False)
    fields.only("hidden_activation", ACTIVATION)
    fields = fields.or_else(DEFAULTS)
    activation = activation_name(fields, "hidden_act", ACTIVATION)
    return GemmaConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", False),
        # The first releases say gelu and mean its approximation, as transformers has it too.
        activation=ACTIVATION if activation == "gelu" else activation,
    )


def hidden_states(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """The scale is rounded to the dtype of the tokens, as it was in training."""
    return tokens.mul_(torch.tensor(config.hidden_size**0.5, dtype=tokens.dtype))


def block(
    config: GemmaConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = norm(config, ops, x, w["input_norm"])
    heads = linear(ops, "qkv", h, w).view(len(h), -1, config.head_dim)
    ops.rope_(heads[:, : config.n_heads + config.n_kv_heads], *ropes[0])
    attended = yield new_tokens_of(config, heads)
    add_linear(ops, "o", x, attended, w)
    h = norm(config, ops, x, w["post_norm"])
    h = gated(ops, config.activation, linear(ops, "gate_up", h, w))
    add_linear(ops, "down", x, h, w)


def norm(config: ModelConfig, ops: Ops, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm by 1 + weight, in float32: a sum in fewer bits would lose most of the weight's."""
    return ops.rms_norm(x.float(), weight.float() + 1, config.norm_eps).to(x.dtype)


def head_input(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return norm(config, ops, x, w["final_norm"])
