"""CodeGen: GPT-J with one projection, in four parts of some heads' queries, values and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import Block, RopeTable, gptj
from sl_serve.models.gptj import PREFIX, GPTJConfig, rotated
from sl_serve.models.parts import add_mlp, layer_norm, linear, mlp_input, new_tokens_of
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.layout import LayerWeights, Param

N_PARTS = 4  # cores that it was trained on

hidden_states, head_input = gptj.hidden_states, gptj.head_input
static_tensors = gptj.static_tensors


def model_config(fields: Fields, generation: Fields) -> GPTJConfig:
    config = gptj.model_config(fields, generation)
    if config.n_heads % N_PARTS:
        raise ModelError(f"{fields.source}: {config.n_heads} heads cannot stand in {N_PARTS} parts")
    return config


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    return gptj.params_with(config, {PREFIX + "attn.qkv_proj": 3 * config.hidden_size})


def block(
    config: GPTJConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    parts = linear(ops, "qkv", h, w).view(len(h), N_PARTS, 3, -1, config.head_dim)
    q, v, k = (kind.flatten(1, 2) for kind in parts.unbind(2))
    heads = rotated(config, ops, torch.cat((q, k, v), dim=1), ropes[0])
    attended = yield new_tokens_of(config, heads)
    h = mlp_input(ops, x, attended, w, config.norm_eps, parallel=True)
    add_mlp(ops, config.activation, x, h, w)
