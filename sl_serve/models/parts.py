"""What several families' files are made of: their tensors and their products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch.nn import functional as F

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import NewTokens, RopeTable, StaticTensors
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.layout import LayerWeights, Param


@dataclass(frozen=True, slots=True)
class WindowedConfig(ModelConfig):
    """Of a model some of whose layers see only the last tokens."""

    # Of each layer: how many tokens, a token itself included; None: all.
    windows: tuple[int | None, ...] = ()

    def scoring(self, layer: int) -> Scoring:
        window = self.windows[layer]
        # The quicker way where no text outgrows the window.
        is_none = window is None or window >= self.max_positions
        return CAUSAL if is_none else Scoring(window=window)


@dataclass(frozen=True, slots=True)
class PartlyRotatedConfig(WindowedConfig):
    """Of a model some of whose layers do not rotate."""

    rotates: tuple[bool, ...] = ()  # of each layer

    def rope(self, layer: int, ropes: Sequence[RopeTable]) -> RopeTable | None:
        return ropes[0] if self.rotates[layer] else None


def linear_params(
    name: str, n_in: int, outputs: Mapping[str, int], bias: bool
) -> tuple[Param, ...]:
    """`outputs`: checkpoint module -> its number of outputs; several are joined into one matrix.
    With `bias`, its vector is called `name`_bias."""
    rows = tuple(outputs.values())
    weights = tuple(f"{module}.weight" for module in outputs)
    matrix = Param(name, (n_in, sum(rows)), weights, rows)
    if not bias:
        return (matrix,)
    biases = tuple(f"{module}.bias" for module in outputs)
    return (matrix, Param(f"{name}_bias", (sum(rows),), biases, rows))


def vector_param(name: str, source: str, size: int) -> Param:
    return Param(name, (size,), (source,), (size,))


def layer_norm_params(name: str, module: str, size: int, bias: bool = True) -> tuple[Param, ...]:
    weight = vector_param(name, f"{module}.weight", size)
    return (weight, vector_param(f"{name}_bias", f"{module}.bias", size)) if bias else (weight,)


def layer_norm_tensors(name: str, module: str, size: int) -> StaticTensors:
    """Of a LayerNorm outside the layers."""
    return {
        name: (f"{module}.weight", (size,)),
        f"{name}_bias": (f"{module}.bias", (size,)),
    }


def vocabulary_tensors(config: ModelConfig, embed: str) -> StaticTensors:
    """`embed`: the module of the table, which is the head too where the two are tied."""
    table = (f"{embed}.weight", (config.vocab_size, config.hidden_size))
    return {
        "embed": table,
        "head": table if config.tie_embeddings else ("lm_head.weight", table[1]),
    }


def layer_norm(ops: Ops, name: str, x: torch.Tensor, w: LayerWeights, eps: float) -> torch.Tensor:
    """With the bias `name`_bias, where there is one."""
    weight, bias = w[name], w.get(f"{name}_bias")
    return ops.layer_norm(x, weight, torch.zeros_like(weight) if bias is None else bias, eps)


def final_layer_norm(
    config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor
) -> torch.Tensor:
    return layer_norm(ops, "final_norm", x, w, config.norm_eps)


def norm_heads(ops: Ops, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """RMSNorm of each head of x (T, heads, D) by itself, in place."""
    x.copy_(ops.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape))


def layer_norm_heads(x: torch.Tensor, weights: torch.Tensor, eps: float) -> None:
    """LayerNorm of each head of x (T, heads, D) with its own of `weights` (heads * D), in place."""
    x.copy_(F.layer_norm(x, x.shape[-1:], eps=eps).mul_(weights.view(x.shape[1:])))


Activation = Callable[[torch.Tensor], torch.Tensor]
_GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": F.relu,
}


def activation_name(fields: Fields, key: str, default: str) -> str:
    """One of ACTIVATIONS. Raises ModelError for another."""
    name = fields.text(key, default)
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ModelError(f"{fields.source}: {key} {name[:40]!r} is not supported ({known})")
    return name


def gated(ops: Ops, activation: str, gate_up: torch.Tensor) -> torch.Tensor:
    """The activation of the first half of each line times the second: (T, 2 I) -> (T, I)."""
    if ACTIVATIONS[activation] is F.silu:
        return ops.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)


def mlp_input(
    ops: Ops, x: torch.Tensor, attended: torch.Tensor, w: LayerWeights, eps: float, parallel: bool
) -> torch.Tensor:
    """x after the MLP's LayerNorm, or the one and only; attention's output is added to x before
    that, or, where the MLP works in parallel to attention, after it."""
    name = "mlp_norm" if "mlp_norm" in w else "attention_norm"
    if not parallel:
        add_linear(ops, "o", x, attended, w)
    h = layer_norm(ops, name, x, w, eps)
    if parallel:
        add_linear(ops, "o", x, attended, w)
    return h


def add_mlp(ops: Ops, activation: str, x: torch.Tensor, h: torch.Tensor, w: LayerWeights) -> None:
    """x += fc2 of the activation of fc1 of h."""
    add_linear(ops, "fc2", x, ACTIVATIONS[activation](linear(ops, "fc1", h, w)), w)


def heads_in_order(qkv: torch.Tensor, n_kv_heads: int, head_dim: int) -> torch.Tensor:
    """(T, Hq + 2 Hk, D): all queries, all keys, all values, of a projection (T, outputs) that
    gives, for one key head after another, its queries, the key and the value."""
    groups = qkv.view(len(qkv), n_kv_heads, -1, head_dim)
    return torch.cat((groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]), dim=1)


def halves_apart(heads: torch.Tensor, n_dims: int) -> None:
    """Of the first n_dims elements of each head, in place: neighbours, which some families rotate
    as pairs, come to stand n_dims / 2 apart, as `rope_` wants them. Done to queries and keys alike
    it leaves their products as they are."""
    turned = heads[..., :n_dims]
    turned.copy_(turned.view(*turned.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2))


def new_tokens_of(config: ModelConfig, heads: torch.Tensor, scoring: Scoring = CAUSAL) -> NewTokens:
    """`heads`: (T, Hq + 2 Hk, D), queries, keys and values."""
    n_q, n_kv = config.n_heads, config.n_kv_heads
    return NewTokens(heads[:, :n_q], heads[:, n_q : n_q + n_kv], heads[:, n_q + n_kv :], scoring)


@cache
def alibi_slopes(n_heads: int, device: torch.device) -> torch.Tensor:
    """(Hq,) float32: powers of 2^(-8/n), where n is the number of heads or the power of two below
    it; the heads past n have every other power of 2^(-4/n) (ALiBi, arXiv 2108.12409)."""
    n = 1 << (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * i / n) for i in range(1, 2 * (n_heads - n), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def linear(ops: Ops, name: str, x: torch.Tensor, w: LayerWeights) -> torch.Tensor:
    return ops.linear(name, x, w[name], w.get(f"{name}_bias"))


def add_linear(ops: Ops, name: str, x: torch.Tensor, h: torch.Tensor, w: LayerWeights) -> None:
    ops.add_linear_(x, h, w[name], w.get(f"{name}_bias"))


def product(ops: Ops, name: str, h: torch.Tensor, w: LayerWeights) -> torch.Tensor:
    """What `add_linear` would add, for a family that does more to it first. One scratch buffer
    serves all."""
    return ops.linear("product", h, w[name], w.get(f"{name}_bias"))
