"""GPT-J: LayerNorm, MLP beside attention behind one norm, rotation of neighbouring elements in a
part of each head, and a bias on logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig, RopeConfig
from sl_serve.models import Block, RopeTable, StaticTensors, llama
from sl_serve.models.parts import (
    activation_name,
    add_mlp,
    final_layer_norm,
    halves_apart,
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
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

TOP = "transformer."
PREFIX = TOP + "h.{layer}."
# Where decoders have their usual names -> where OpenAI's, and those that followed, have theirs.
OWN_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

hidden_states, head_input = llama.hidden_states, final_layer_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTJConfig(ModelConfig):
    activation: str


def model_config(fields: Fields, generation: Fields) -> GPTJConfig:
    fields = usual_names(fields)
    settings = decoder_fields(fields, generation) | {
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "ropes": (RopeConfig(n_dims=fields.integer("rotary_dim", 64)),),
    }
    activation = activation_name(fields, "activation_function", "gelu_new")
    return GPTJConfig(**settings, mlp_bias=True, activation=activation)


def usual_names(fields: Fields) -> Fields:
    """As `decoder_fields` reads them."""
    fields = fields.or_else({usual: fields.get(own) for usual, own in OWN_NAMES.items()})
    inner_size = fields.integer("n_inner", 4 * fields.integer("hidden_size"))
    return fields.with_values({"intermediate_size": inner_size, "num_key_value_heads": None})


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    qkv = {f"{PREFIX}attn.{name}_proj": config.hidden_size for name in "qkv"}
    return params_with(config, qkv)


def params_with(config: ModelConfig, qkv: dict[str, int]) -> tuple[Param, ...]:
    """`qkv`: modules of the projections -> their outputs."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return (
        *layer_norm_params("attention_norm", PREFIX + "ln_1", hidden),
        *linear_params("qkv", hidden, qkv, False),
        *linear_params("o", hidden, {PREFIX + "attn.out_proj": hidden}, False),
        *linear_params("fc1", hidden, {PREFIX + "mlp.fc_in": inner}, config.mlp_bias),
        *linear_params("fc2", inner, {PREFIX + "mlp.fc_out": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    return {
        **vocabulary_tensors(config, TOP + "wte"),
        **layer_norm_tensors("final_norm", TOP + "ln_f", config.hidden_size),
        "head_bias": ("lm_head.bias", (config.vocab_size,)),
    }


def block(
    config: GPTJConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    heads = linear(ops, "qkv", h, w).view(len(h), -1, config.head_dim)
    attended = yield new_tokens_of(config, rotated(config, ops, heads, ropes[0]))
    h = mlp_input(ops, x, attended, w, config.norm_eps, parallel=True)
    add_mlp(ops, config.activation, x, h, w)


def rotated(config: ModelConfig, ops: Ops, heads: torch.Tensor, rope: RopeTable) -> torch.Tensor:
    """`heads`, (T, 3 Hq, D): its queries and keys are turned in place."""
    turning = heads[:, : 2 * config.n_heads]
    halves_apart(turning, 2 * rope.cos.shape[1])
    ops.rope_(turning, *rope)
    return heads
