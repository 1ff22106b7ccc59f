"""GPT-2: learned positions, LayerNorm, biases everywhere, matrices stored (in, out)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, StaticTensors
from sl_serve.models.gptj import usual_names
from sl_serve.models.parts import (
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
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

TOP = "transformer."
PREFIX = TOP + "h.{layer}."
TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")

head_input = final_layer_norm


GGUF = GgufDialect(
    "gpt2", {"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "n_inner"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config(ModelConfig):
    activation: str
    scaled: bool  # scores by 1/sqrt(head_dim)
    scaled_by_layer: bool  # scores by 1/(layer + 1) too


def model_config(fields: Fields, generation: Fields) -> GPT2Config:
    fields.only("add_cross_attention", False)
    fields = usual_names(fields.or_else({"tie_word_embeddings": True, "n_positions": 1024}))
    settings = decoder_fields(fields, generation) | {
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "ropes": (),
    }
    return GPT2Config(
        **settings,
        attention_bias=True,
        mlp_bias=True,
        # Programs that quantise write (out, in).
        transposed=() if "quantization_config" in fields else TRANSPOSED,
        activation=activation_name(fields, "activation_function", "gelu_new"),
        scaled=fields.boolean("scale_attn_weights", True),
        scaled_by_layer=fields.boolean("scale_attn_by_inverse_layer_idx", False),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.attention_bias
    attn, mlp = PREFIX + "attn.", PREFIX + "mlp."
    n_qkv = config.q_size + 2 * config.kv_size
    return (
        *layer_norm_params("attention_norm", PREFIX + "ln_1", hidden),
        *linear_params("qkv", hidden, {attn + "c_attn": n_qkv}, bias),
        *linear_params("o", hidden, {attn + "c_proj": hidden}, bias),
        *layer_norm_params("mlp_norm", PREFIX + "ln_2", hidden),
        *linear_params("fc1", hidden, {mlp + "c_fc": inner}, config.mlp_bias),
        *linear_params("fc2", inner, {mlp + "c_proj": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    return {
        **vocabulary_tensors(config, TOP + "wte"),
        "positions": (TOP + "wpe.weight", (config.max_positions, config.hidden_size)),
        **layer_norm_tensors("final_norm", TOP + "ln_f", config.hidden_size),
    }


def hidden_states(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    table: torch.Tensor = w["positions"]
    return tokens + table[positions]


def block(
    config: GPT2Config,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    heads = linear(ops, "qkv", h, w).view(len(h), -1, config.head_dim)
    attended = yield new_tokens_of(config, heads, scoring(config, layer))
    h = mlp_input(ops, x, attended, w, config.norm_eps, parallel=False)
    add_mlp(ops, config.activation, x, h, w)


def scoring(config: GPT2Config, layer: int) -> Scoring:
    if config.scaled and not config.scaled_by_layer:
        return CAUSAL
    scale = config.head_dim**-0.5 if config.scaled else 1.0
    return Scoring(scale / (layer + 1) if config.scaled_by_layer else scale)
