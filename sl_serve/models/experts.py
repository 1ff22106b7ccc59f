"""Experts of the usual kind: gated MLPs, of which a router gives each token a few."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models.llama import gated_up
from sl_serve.models.parts import linear, linear_params
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.layout import LayerWeights, Param


def expert_params(
    config: ModelConfig,
    module: str,
    layers: Collection[int] | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    bias: bool = False,
) -> tuple[Param, ...]:
    """`module`: an expert's, with "{expert}" in it; `names`: of its gate, up and down in there;
    `bias`: each has one."""
    hidden, inner = config.hidden_size, config.expert_size
    gate, up, down = (f"{module}.{name}" for name in names)
    params = (
        *linear_params("gate_up", hidden, {gate: inner, up: inner}, bias),
        *linear_params("down", inner, {down: hidden}, bias),
    )
    return tuple(replace(p, layers=layers, n_experts=config.n_experts) for p in params)


def dense_in(config: ModelConfig, params: Iterable[Param], sparse: Collection[int]) -> list[Param]:
    """A family's params, with its MLP in those layers alone that have no experts."""
    dense = tuple(i for i in range(config.n_layers) if i not in sparse)
    return [replace(p, layers=dense) if p.name in ("gate_up", "down") else p for p in params]


def router_params(
    config: ModelConfig, module: str, layers: Collection[int] | None = None, bias: bool = False
) -> tuple[Param, ...]:
    """Of few bytes, and small differences of what it gives decide: it stays exact."""
    params = linear_params("router", config.hidden_size, {module: config.n_experts}, bias)
    return tuple(replace(p, layers=layers, is_exact=True) for p in params)


def gated_expert(ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return linear(ops, "down", gated_up(ops, w, x), w)


def likeliest(logits: torch.Tensor, n: int, sum_to_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The n best of logits (T, experts), and their shares of the softmax over all of them, or of
    that over these n: (T, n) each."""
    shares, experts = logits.float().softmax(-1).topk(n)
    return experts, shares / shares.sum(-1, keepdim=True) if sum_to_one else shares


def sparse_layers(fields: Fields, n_layers: int) -> tuple[int, ...]:
    """The layers that have experts, as Qwen's settings say it: every so many, but for some."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise ModelError(f"{fields.source}: mlp_only_layers must be numbers of layers")
    return tuple(i for i in range(n_layers) if i not in dense and (i + 1) % step == 0)


def n_experts(fields: Fields, *keys: str) -> int:
    """Of a layer; the first of `keys` that is there says it."""
    return fields.integer(next((key for key in keys if key in fields), keys[0]))
