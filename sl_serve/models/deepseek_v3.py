"""DeepSeek-V3 and R1 (arXiv 2412.19437): attention over latents, experts in groups beside shared
ones, and dense layers first. Its predecessor (deepseek_v2.py) chooses experts in another way.

What is kept of a token is one line for all heads: a latent, of which each head would make its key
and its value, and a rotated part that all keys share. The matrix that makes them is multiplied with
the query and with what attention gave instead (arXiv 2405.04434, 2.1.2), so attention has one head
of keys, whose values are the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, NewTokens, RopeTable, Routed, llama
from sl_serve.models.deepseek_gguf import SIGMOID, deepseek_dialect
from sl_serve.models.experts import expert_params, gated_expert, n_experts, router_params
from sl_serve.models.llama import head_input, hidden_states, static_tensors
from sl_serve.models.parts import add_linear, halves_apart, linear, linear_params, vector_param
from sl_serve.ops import Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.hf_fields import decoder_fields, yarn_amplitude
from sl_serve.weights.layout import LayerWeights, Param
from sl_serve.weights.quantised import Weight

__all__ = [
    "block",
    "expert",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = deepseek_dialect(SIGMOID)

ATTENTION, MLP = llama.PREFIX + "self_attn.", llama.PREFIX + "mlp."
LATENT_NORM_EPS = 1e-6  # of both; not among the settings


@dataclass(frozen=True, slots=True)
class DeepseekConfig(ModelConfig):
    """head_dim is that of the lines that are kept: a latent and the rotated part."""

    q_rank: int | None = None  # of the latent that queries are made of; None: they are not
    kv_rank: int = 0  # of the latent
    nope_dim: int = 0  # of a head's query, what is not rotated
    rope_dim: int = 0
    v_dim: int = 0
    scale: float = 1.0
    interleaved: bool = True  # pairs that turn lie side by side
    n_dense_layers: int = 0  # the first ones
    shared_size: int = 0  # intermediate size of the experts that all tokens pass, as one
    n_groups: int = 1
    groups_per_token: int = 1
    corrects: bool = True  # scores of experts, before the best are chosen
    sum_to_one: bool = True  # the weights of a token's experts, before:
    routed_scale: float = 1.0

    @property
    def sparse(self) -> range:
        return range(self.n_dense_layers, self.n_layers)


def model_config(fields: Fields, generation: Fields) -> DeepseekConfig:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    return DeepseekConfig(
        **latent_fields(fields, generation),
        n_dense_layers=fields.integer("first_k_dense_replace", 3, low=0),
        n_groups=fields.integer("n_group", 8),
        groups_per_token=fields.integer("topk_group", 4),
        sum_to_one=fields.boolean("norm_topk_prob", True),
        routed_scale=fields.number("routed_scaling_factor", 2.5),
    )


def latent_fields(fields: Fields, generation: Fields) -> dict[str, Any]:
    """What both generations say in the same words."""
    fields.only("hidden_act", "silu")
    fields.only("moe_layer_freq", 1)
    common = decoder_fields(fields, generation)
    rank, rope_dim = fields.integer("kv_lora_rank", 512), fields.integer("qk_rope_head_dim", 64)
    nope_dim = fields.integer("qk_nope_head_dim", 128)
    inner = fields.integer("moe_intermediate_size")
    return common | {
        "n_kv_heads": 1,
        "head_dim": rank + rope_dim,
        "values_are_keys": True,
        "ropes": tuple(replace(rope, n_dims=rope_dim) for rope in common["ropes"]),
        "attention_bias": fields.boolean("attention_bias", False),
        "n_experts": n_experts(fields, "n_routed_experts", "num_local_experts"),
        "experts_per_token": fields.integer("num_experts_per_tok"),
        "expert_size": inner,
        "q_rank": fields.integer("q_lora_rank") if "q_lora_rank" in fields else None,
        "kv_rank": rank,
        "nope_dim": nope_dim,
        "rope_dim": rope_dim,
        "v_dim": fields.integer("v_head_dim", 128),
        "scale": (nope_dim + rope_dim) ** -0.5 * _mscale(fields) ** 2,
        "interleaved": fields.boolean("rope_interleave", True),
        "shared_size": inner * fields.integer("n_shared_experts"),
    }


def _mscale(fields: Fields) -> float:
    """What yarn's longer contexts do to the scores' temperature."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    scaling = Fields(raw, f"{fields.source}: rotary parameters")
    if not scaling.get("mscale_all_dim"):
        return 1.0
    return yarn_amplitude(scaling.number("factor"), scaling.number("mscale_all_dim"))


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    assert isinstance(config, DeepseekConfig)
    dense = range(config.n_dense_layers)
    hidden, inner, bias = config.hidden_size, config.shared_size, config.attention_bias
    kv_b, o = config.n_heads * (config.nope_dim + config.v_dim), config.n_heads * config.v_dim
    outer = {p.name: p for p in llama.layer_params(config)}
    module = MLP + "shared_experts."
    gate_up = {module + "gate_proj": inner, module + "up_proj": inner}
    shared = (
        *linear_params("shared_gate_up", hidden, gate_up, False),
        *linear_params("shared_down", inner, {module + "down_proj": hidden}, False),
    )
    correction = vector_param("correction", MLP + "gate.e_score_correction_bias", config.n_experts)
    corrections = (replace(correction, layers=config.sparse),) if config.corrects else ()
    return (
        outer["input_norm"],
        *_query_params(config),
        *linear_params("kv_a", hidden, {ATTENTION + "kv_a_proj_with_mqa": config.head_dim}, bias),
        vector_param("kv_norm", ATTENTION + "kv_a_layernorm.weight", config.kv_rank),
        *linear_params("kv_b", config.kv_rank, {ATTENTION + "kv_b_proj": kv_b}, False),
        *linear_params("o", o, {ATTENTION + "o_proj": hidden}, bias),
        outer["post_norm"],
        *(replace(outer[name], layers=dense) for name in ("gate_up", "down")),
        *router_params(config, MLP + "gate", config.sparse),
        *corrections,
        *(replace(p, layers=config.sparse) for p in shared),
        *expert_params(config, MLP + "experts.{expert}", config.sparse),
    )


def _query_params(config: DeepseekConfig) -> tuple[Param, ...]:
    hidden, size = config.hidden_size, config.n_heads * (config.nope_dim + config.rope_dim)
    rank = config.q_rank
    if rank is None:
        return linear_params("q", hidden, {ATTENTION + "q_proj": size}, False)
    return (
        *linear_params("q_a", hidden, {ATTENTION + "q_a_proj": rank}, config.attention_bias),
        vector_param("q_norm", ATTENTION + "q_a_layernorm.weight", rank),
        *linear_params("q", rank, {ATTENTION + "q_b_proj": size}, False),
    )


Choose = Callable[[DeepseekConfig, torch.Tensor, LayerWeights], tuple[torch.Tensor, torch.Tensor]]


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    return latent_block(config, ops, w, x, ropes[0], choice)


def latent_block(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    x: torch.Tensor,
    rope: RopeTable,
    choose: Choose,
) -> Block:
    """`choose`: as `choice`, from the settings, logits and the layer's tensors."""
    assert isinstance(config, DeepseekConfig)
    kv_b = _rows(ops, w["kv_b"], x).view(config.n_heads, -1, config.kv_rank)
    to_keys, to_values = kv_b[:, : config.nope_dim], kv_b[:, config.nope_dim :]
    attended = yield new_tokens(config, ops, w, x, to_keys, rope)
    latents = attended.view(len(x), config.n_heads, -1)[..., : config.kv_rank]
    values = latents.transpose(0, 1) @ to_values.transpose(1, 2)
    add_linear(ops, "o", x, values.transpose(0, 1).flatten(1), w)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    if "router" not in w:
        add_linear(ops, "down", x, llama.gated_up(ops, w, h), w)
        return
    routed = choose(config, router_logits(ops, h, w), w)
    add_linear(ops, "shared_down", x, ops.silu_mul(linear(ops, "shared_gate_up", h, w)), w)
    x += yield Routed(h, *routed)


def new_tokens(
    config: DeepseekConfig,
    ops: Ops,
    w: LayerWeights,
    x: torch.Tensor,
    to_keys: torch.Tensor,
    rope: RopeTable,
) -> NewTokens:
    """`to_keys` (heads, nope_dim, rank): what makes the part of a key that is not rotated."""
    h = ops.rms_norm(x, w["input_norm"], config.norm_eps)
    k = linear(ops, "kv_a", h, w)
    if config.q_rank is not None:
        h = ops.rms_norm(linear(ops, "q_a", h, w), w["q_norm"], LATENT_NORM_EPS)
    q = linear(ops, "q", h, w).view(len(x), config.n_heads, -1)
    rank, nope_dim = config.kv_rank, config.nope_dim
    lines = x.new_empty(len(x), config.n_heads + 1, config.head_dim)
    lines[:, :-1, :rank] = (q[..., :nope_dim].transpose(0, 1) @ to_keys).transpose(0, 1)
    lines[:, :-1, rank:] = q[..., nope_dim:]
    lines[:, -1, :rank] = ops.rms_norm(k[:, :rank].contiguous(), w["kv_norm"], LATENT_NORM_EPS)
    lines[:, -1, rank:] = k[:, rank:]
    rotated = lines[..., rank:]
    if config.interleaved:
        halves_apart(rotated, rotated.shape[-1])
    ops.rope_(rotated, rope.cos, rope.sin)
    own = lines[:, -1:]
    return NewTokens(lines[:, :-1], own, own, Scoring(scale=config.scale))


def _rows(ops: Ops, w: Weight, x: torch.Tensor) -> torch.Tensor:
    """w (in, out) as (out, in) of the dtype that is computed with."""
    if isinstance(w, torch.Tensor) and w.dtype == ops.dtype:
        return w.t()
    rows = x.new_empty(w.shape[1], w.shape[0])
    ops.expand(w, rows.t())
    return rows


def router_logits(ops: Ops, h: torch.Tensor, w: LayerWeights) -> torch.Tensor:
    """In float32, whatever else is computed in."""
    if ops.dtype is torch.float32:
        return linear(ops, "router", h, w)
    router: torch.Tensor = w["router"]
    return h.float() @ router.float()


def choice(
    config: DeepseekConfig, logits: torch.Tensor, w: LayerWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and their weights, (T, n) each, of logits (T, experts): the best of the groups whose
    two best are best. Corrected scores choose, plain ones weigh."""
    scores = logits.sigmoid()
    corrected = scores + w["correction"].float()
    corrected = of_best_groups(config, corrected, n_counted=2)
    experts = corrected.topk(config.experts_per_token).indices
    weights = scores.gather(1, experts)
    if config.sum_to_one:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * config.routed_scale


def of_best_groups(config: DeepseekConfig, scores: torch.Tensor, n_counted: int) -> torch.Tensor:
    """scores (T, experts), but -inf outside of the groups whose n_counted best sum up to most."""
    if config.groups_per_token >= config.n_groups:
        return scores
    groups = scores.view(len(scores), config.n_groups, -1)
    best = groups.topk(n_counted, dim=-1).values.sum(-1).topk(config.groups_per_token).indices
    left_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
    return groups.masked_fill(left_out[..., None], -torch.inf).flatten(1)


def expert(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return gated_expert(ops, w, x)
