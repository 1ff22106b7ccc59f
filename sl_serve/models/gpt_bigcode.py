"""StarCoder 1 and SantaCoder: GPT-2 with one key head, or a projection that gives each head's
query, key and value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sl_serve.models import Block, RopeTable, gpt2
from sl_serve.models.gpt2 import GPT2Config
from sl_serve.models.parts import (
    add_mlp,
    heads_in_order,
    layer_norm,
    linear,
    mlp_input,
    new_tokens_of,
)
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.layout import LayerWeights

layer_params, static_tensors = gpt2.layer_params, gpt2.static_tensors
hidden_states, head_input = gpt2.hidden_states, gpt2.head_input


GGUF = GgufDialect(
    "starcoder",
    {"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "n_inner"},
    derived=lambda fields, _tensors: {"multi_query": fields["num_key_value_heads"] == 1},
)


def model_config(fields: Fields, generation: Fields) -> GPT2Config:
    config = gpt2.model_config(fields, generation)
    n_kv_heads = 1 if fields.boolean("multi_query", True) else config.n_heads
    return replace(config, n_kv_heads=n_kv_heads, transposed=())


def block(
    config: GPT2Config,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    heads = heads_in_order(linear(ops, "qkv", h, w), config.n_kv_heads, config.head_dim)
    attended = yield new_tokens_of(config, heads, gpt2.scoring(config, layer))
    h = mlp_input(ops, x, attended, w, config.norm_eps, parallel=False)
    add_mlp(ops, config.activation, x, h, w)
