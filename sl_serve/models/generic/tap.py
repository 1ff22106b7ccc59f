"""Where a module of transformers is opened: its matrix products are the engine's, those of experts
too, and its attention is asked for instead of computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ExpertsInterface

from sl_serve.models import NewTokens
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.layout import LayerWeights
from sl_serve.weights.quantised import QuantisedWeight, Weight

OURS = "sl_serve"  # our name among transformers' ways to attend, and to compute experts


class UnfitError(Exception):
    """The reason why a model cannot run through its module."""


class Reached(Exception):
    """The run has come to what it is for."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


@dataclass(slots=True)
class Run:
    """What a run through a model's module is for."""

    layer: int  # whose module is run; as many as there are: the head's input
    x: torch.Tensor | None = None  # (1, T, hidden) that it gets; None: what it would get is wanted
    ops: Ops | None = None
    weights: LayerWeights | None = None
    attended: torch.Tensor | None = None  # (T, Hq * D); None: queries, keys and values are wanted
    logits: torch.Tensor | None = None  # what the head gives; None: its input is wanted


class Tap:
    """What the modules of a model share: the run that they are in."""

    def __init__(self) -> None:
        self.run = Run(0)

    def product(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """In place of nn.Linear's. `module`: its name within the layer, and a dot."""
        run = self.run
        assert run.ops is not None and run.weights is not None
        w, bias = run.weights[f"{module}weight"], run.weights.get(f"{module}bias")
        out = run.ops.linear(module, x.reshape(-1, x.shape[-1]), w, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """q (1, Hq, T, D), k (1, Hk, T, D), v (1, Hk, T, at most D) -> (1, T, Hq, as wide)."""
        attended, self.run.attended = self.run.attended, None
        if attended is None:
            raise Reached(_new_tokens(q, k, v, scoring))
        n_heads, n_tokens, head_dim = q.shape[1:]
        return attended.view(1, n_tokens, n_heads, head_dim)[..., : v.shape[-1]]

    def experts(
        self, module: Any, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """x (T, hidden), chosen and shares (T, k) -> the sums of what the chosen experts make."""
        made = torch.zeros_like(x)
        for expert, tokens, choices in _by_expert(chosen, module.num_experts):
            inner = self._expert(module, "gate_up_proj", expert, x[tokens])
            outer = self._expert(module, "down_proj", expert, module._apply_gate(inner))
            made.index_add_(0, tokens, (outer * shares[tokens, choices, None]).to(made.dtype))
        return made

    def _expert(self, module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        run, width = self.run, getattr(module, name).shape[1]
        assert run.ops is not None and run.weights is not None
        w = run.weights[f"{module.tapped_as}{name}"]
        part = _columns(w, expert * width, (expert + 1) * width)
        return run.ops.linear(name, x, part, None)


def _by_expert(
    chosen: torch.Tensor, n_experts: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """An expert, the tokens that chose it, and which choice of theirs it is."""
    if chosen.is_meta:  # where only sizes are looked at: all choose the first
        tokens = torch.arange(len(chosen), device="meta")
        yield 0, tokens, torch.zeros_like(tokens)
        return
    for expert in sorted(set(chosen.flatten().tolist())):
        if expert < n_experts:  # beyond them: nobody
            yield expert, *torch.where(chosen == expert)


def _columns(w: Weight, start: int, stop: int) -> Weight:
    """Outputs [start, stop) of w (in, out)."""
    if not isinstance(w, QuantisedWeight):
        return w[:, start:stop]
    parts = []
    for columns, rows in w.columns():
        first, last = max(start, columns.start), min(stop, columns.stop)
        if first < last:
            parts.append(rows[first - columns.start : last - columns.start])
    return QuantisedWeight(tuple(parts))


def _new_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring) -> NewTokens:
    """In memory of their own. Values narrower than keys are filled up with zeros."""
    if q.shape[0] != 1 or k.shape[2] != q.shape[2]:
        raise UnfitError("its layers attend to other tokens than their own")
    if v.shape[-1] > k.shape[-1] or q.shape[-1] != k.shape[-1]:
        raise UnfitError(f"its values are wider ({v.shape[-1]}) than its keys ({k.shape[-1]})")
    v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
    q, k, v = (x[0].transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    return NewTokens(q, k, v, scoring)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it; what else it is told (dropout, the window) stands in the mask or
    does not matter here."""
    if position_bias is not None:
        raise UnfitError("its attention adds a bias of positions")
    window = None
    if attention_mask is not None:
        if attention_mask.numel() != 1:
            raise UnfitError("it masks attention by means of its own")
        window = int(attention_mask)
    if scaling == CAUSAL.scale_for(query.shape[-1]):
        scaling = None
    sinks = None if s_aux is None else s_aux.float()
    is_causal = (scaling, window, softcap, sinks) == (None, None, None, None)
    scoring = CAUSAL if is_causal else Scoring(scaling, window, softcap, sinks=sinks)
    return module.tap.attend(query, key, value, scoring), None


def _mask(*_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor | None:
    """What stands for a mask: its window, or nothing."""
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size, device="cpu")


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As transformers calls it."""
    is_known = module.has_gate and module.is_concatenated
    if not is_known or module.is_transposed or module.has_bias or module.has_post_expert_norm:
        raise UnfitError("its experts are of a kind that is not known")
    made: torch.Tensor = module.tap.experts(module, hidden_states, top_k_index, top_k_weights)
    return made


def register() -> None:
    """Among transformers' ways, under our name."""
    AttentionInterface.register(OURS, _attention)
    AttentionMaskInterface.register(OURS, _mask)
    ExpertsInterface.register(OURS, _experts)
