"""OPT: learned positions, LayerNorm, ReLU, biases everywhere. In the 350m one, norms come after
attention and MLP, and embedding and head are narrower than the layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import Block, NewTokens, RopeTable, StaticTensors
from sl_serve.models.parts import add_linear, linear, linear_params, vector_param
from sl_serve.ops import Ops
from sl_serve.weights.fields import MAX_LAYERS, Fields
from sl_serve.weights.hf_fields import bos_token_id, eos_token_ids, stored_dtype
from sl_serve.weights.layout import LayerWeights, Param

TOP = "model.decoder."
PREFIX = TOP + "layers.{layer}."
POSITION_OFFSET = 2  # lines of the table in front of that of position 0


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    fields.only("activation_function", "relu")
    fields.only("layer_norm_elementwise_affine", True)
    n_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    if hidden_size % n_heads:
        raise ModelError(f"{fields.source}: {n_heads} heads cannot share {hidden_size} elements")
    vocab_size = fields.integer("vocab_size")
    norm_first = fields.boolean("do_layer_norm_before", True)
    has_biases = fields.boolean("enable_bias", True)
    embed_size = fields.integer("word_embed_proj_dim", hidden_size)
    return ModelConfig(
        family=fields.text("model_type"),
        n_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("ffn_dim"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden_size // n_heads,
        vocab_size=vocab_size,
        max_positions=fields.integer("max_position_embeddings", 2048),
        norm_eps=1e-5,  # the same in all of them, and not among the settings
        ropes=(),
        tie_embeddings=fields.boolean("tie_word_embeddings", True),
        attention_bias=has_biases,
        mlp_bias=has_biases,
        norm_first=norm_first,
        final_norm=norm_first and not fields.boolean("_remove_final_layer_norm", False),
        embed_size=None if embed_size == hidden_size else embed_size,
        dtype=stored_dtype(fields),
        eos_token_ids=eos_token_ids(fields, generation, vocab_size),
        bos_token_id=bos_token_id(fields, vocab_size),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner, attn = config.hidden_size, config.intermediate_size, PREFIX + "self_attn."
    qkv = {f"{attn}{name}_proj": hidden for name in "qkv"}
    return (
        vector_param("attention_norm", PREFIX + "self_attn_layer_norm.weight", hidden),
        vector_param("attention_norm_bias", PREFIX + "self_attn_layer_norm.bias", hidden),
        *linear_params("qkv", hidden, qkv, config.attention_bias),
        *linear_params("o", hidden, {attn + "out_proj": hidden}, config.attention_bias),
        vector_param("mlp_norm", PREFIX + "final_layer_norm.weight", hidden),
        vector_param("mlp_norm_bias", PREFIX + "final_layer_norm.bias", hidden),
        *linear_params("fc1", hidden, {PREFIX + "fc1": inner}, config.mlp_bias),
        *linear_params("fc2", inner, {PREFIX + "fc2": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    hidden, width = config.hidden_size, config.embed_size or config.hidden_size
    embed = (TOP + "embed_tokens.weight", (config.vocab_size, width))
    n_lines = config.max_positions + POSITION_OFFSET
    tensors: StaticTensors = {
        "embed": embed,
        "positions": (TOP + "embed_positions.weight", (n_lines, hidden)),
        "head": embed if config.tie_embeddings else ("lm_head.weight", embed[1]),
    }
    if config.final_norm:
        tensors["final_norm"] = (TOP + "final_layer_norm.weight", (hidden,))
        tensors["final_norm_bias"] = (TOP + "final_layer_norm.bias", (hidden,))
    if width != hidden:
        tensors["project_in"] = (TOP + "project_in.weight", (hidden, width))
        tensors["project_out"] = (TOP + "project_out.weight", (width, hidden))
    return tensors


def hidden_states(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    if "project_in" in w:
        tokens = ops.linear("project_in", tokens, w["project_in"].t(), None)
    table: torch.Tensor = w["positions"]
    return tokens + table[positions + POSITION_OFFSET]


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    attended = yield new_tokens(config, ops, w, x)
    add_linear(ops, "o", x, attended, w)
    if not config.norm_first:
        x.copy_(norm(config, ops, "attention_norm", x, w))
    h = norm(config, ops, "mlp_norm", x, w) if config.norm_first else x
    h = linear(ops, "fc1", h, w)
    ops.relu_(h)
    add_linear(ops, "fc2", x, h, w)
    if not config.norm_first:
        x.copy_(norm(config, ops, "mlp_norm", x, w))


def new_tokens(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> NewTokens:
    h = norm(config, ops, "attention_norm", x, w) if config.norm_first else x
    qkv = linear(ops, "qkv", h, w).view(len(h), 3, config.n_heads, config.head_dim)
    q, k, v = qkv.unbind(1)
    return NewTokens(q, k, v)


def norm(
    config: ModelConfig, ops: Ops, name: str, x: torch.Tensor, w: LayerWeights
) -> torch.Tensor:
    return ops.layer_norm(x, w[name], w[f"{name}_bias"], config.norm_eps)


def head_input(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    if config.final_norm:
        x = norm(config, ops, "final_norm", x, w)
    if "project_out" in w:
        x = ops.linear("project_out", x, w["project_out"].t(), None)
    return x
