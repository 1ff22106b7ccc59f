"""Llama 1 to 3.x, and what shares its shape: RMSNorm, rotary positions, grouped queries, SwiGLU."""

from __future__ import annotations

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Attend, RopeTable
from sl_serve.ops import Ops
from sl_serve.weights.layout import LayerWeights, Param

PREFIX = "model.layers.{layer}."


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    attn, mlp = PREFIX + "self_attn.", PREFIX + "mlp."
    params = [
        _vector("input_norm", {PREFIX + "input_layernorm.weight": hidden}),
        _matrix("qkv", hidden, {f"{attn}{n}.weight": size for n, size in qkv.items()}),
        _matrix("o", config.q_size, {attn + "o_proj.weight": hidden}),
        _vector("post_norm", {PREFIX + "post_attention_layernorm.weight": hidden}),
        _matrix("gate_up", hidden, {f"{mlp}{n}.weight": inner for n in ("gate_proj", "up_proj")}),
        _matrix("down", inner, {mlp + "down_proj.weight": hidden}),
    ]
    if config.attention_bias:
        params += [
            _vector("qkv_bias", {f"{attn}{n}.bias": size for n, size in qkv.items()}),
            _vector("o_bias", {attn + "o_proj.bias": hidden}),
        ]
    if config.mlp_bias:
        params += [
            _vector("gate_up_bias", {f"{mlp}{n}.bias": inner for n in ("gate_proj", "up_proj")}),
            _vector("down_bias", {mlp + "down_proj.bias": hidden}),
        ]
    return tuple(params)


def static_tensors(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    embed = ("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    head = embed if config.tie_embeddings else ("lm_head.weight", embed[1])
    return {
        "embed": embed,
        "final_norm": ("model.norm.weight", (config.hidden_size,)),
        "head": head,
    }


def block(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    x: torch.Tensor,
    rope: RopeTable,
    attend: Attend,
) -> None:
    h = ops.rms_norm(x, w["input_norm"], config.norm_eps)
    add_linear(ops, "o", x, attention(config, ops, w, h, rope, attend), w)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    h = ops.silu_mul(linear(ops, "gate_up", h, w))
    add_linear(ops, "down", x, h, w)


def attention(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    h: torch.Tensor,
    rope: RopeTable,
    attend: Attend,
) -> torch.Tensor:
    qkv = linear(ops, "qkv", h, w).view(len(h), -1, config.head_dim)
    n_q, n_kv = config.n_heads, config.n_kv_heads
    ops.rope_(qkv[:, : n_q + n_kv], rope.cos, rope.sin)
    return attend(qkv[:, :n_q], qkv[:, n_q : n_q + n_kv], qkv[:, n_q + n_kv :])


def head_input(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(x, w["final_norm"], config.norm_eps)


def linear(ops: Ops, name: str, x: torch.Tensor, w: LayerWeights) -> torch.Tensor:
    return ops.linear(name, x, w[name], w.get(f"{name}_bias"))


def add_linear(ops: Ops, name: str, x: torch.Tensor, h: torch.Tensor, w: LayerWeights) -> None:
    ops.add_linear_(x, h, w[name], w.get(f"{name}_bias"))


def _matrix(name: str, n_in: int, outputs: dict[str, int]) -> Param:
    return Param(name, (n_in, sum(outputs.values())), tuple(outputs), tuple(outputs.values()))


def _vector(name: str, parts: dict[str, int]) -> Param:
    return Param(name, (sum(parts.values()),), tuple(parts), tuple(parts.values()))
