"""A pass over a model, one layer in memory at a time: what enters each matrix, and what it becomes.

Within a layer, matrices are quantised in the order in which they are used, and each sees what those
before it have become; so does the next layer. Experts come last, one in memory at a time, each with
the tokens that chose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch

from sl_serve.errors import UserError
from sl_serve.host_memory import host_empty
from sl_serve.models import NewTokens, RopeTable, Routed, load_family, run_block
from sl_serve.models.rope import Rotations
from sl_serve.ops import TorchOps
from sl_serve.ops.scored_attention import scored_attention
from sl_serve.quantising.gptq import gptq
from sl_serve.routing import joined, run_experts, shares
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.groups import GROUP_FORMATS, Grouped, GroupFormat
from sl_serve.weights.host import load_expert, load_image, load_static
from sl_serve.weights.layout import LayerLayout, Param, source_name
from sl_serve.weights.quantised import Weight

PASS_TOKENS = 2048  # at once: what they take stays small beside a layer
# Fewer tokens of an expert's say too little of those to come: it is rounded to nearest.
MIN_EXPERT_TOKENS = 32

Blocks = dict[str, torch.Tensor]  # checkpoint name -> uint8 (out, row_bytes)
Ask = Callable[[slice, Routed], torch.Tensor]  # of which tokens, and what


class _EnoughSeenError(Exception):
    """The rest of the layer is not needed."""


class _WatchingOps(TorchOps):
    """Adds up X^T X of the inputs X of one matrix, whatever the family does with it."""

    watched: torch.Tensor | None = None
    hessian: torch.Tensor

    def watch(self, w: torch.Tensor) -> None:
        self.watched, self.hessian = w, torch.zeros(len(w), len(w))

    def linear(
        self, name: str, x: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        self._see(x, w)
        return super().linear(name, x, w, bias)

    def add_linear_(
        self, x: torch.Tensor, h: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> None:
        self._see(h, w)
        super().add_linear_(x, h, w, bias)

    def _see(self, x: torch.Tensor, w: Weight) -> None:
        if w is self.watched:
            self.hessian.addmm_(x.t(), x)
            raise _EnoughSeenError


def _enough(_part: slice, _routed: Routed) -> torch.Tensor:
    raise _EnoughSeenError


def _given(given: torch.Tensor, part: slice, _routed: Routed) -> torch.Tensor:
    return given[part]


class CalibratedLayers:
    """Iterates over the layers, once. Hidden states of all windows stay in memory."""

    def __init__(self, checkpoint: Checkpoint, windows: torch.Tensor, target: Checkpoint) -> None:
        """`windows`: token ids (n, length). `target` says which matrices are to be in groups."""
        self._checkpoint, self._target = checkpoint, target
        self._config = checkpoint.config
        self._family = load_family(self._config.family)
        self._params = self._family.layer_params(self._config)
        self._layout = self._layout_of(self._params)
        self._expert_memory = host_empty(max(1, self._layout.expert_bytes))
        self._ops = _WatchingOps()
        self._length = windows.shape[1]
        positions = torch.arange(self._length).repeat(len(windows))
        config = self._config
        rotations = Rotations(config.ropes, config.head_dim, lambda table: table)
        self._ropes = rotations.tables(positions, torch.full_like(positions, self._length))
        self._hidden = self._embedded(windows.flatten(), positions)

    def __iter__(self) -> Iterator[Blocks]:
        layout = self._layout_of([p for p in self._params if not p.n_experts])
        image = host_empty(layout.image_bytes)
        for layer in range(self._config.n_layers):
            load_image(self._checkpoint, layout, layer, image)
            views = layout.views(image, layer)
            see = partial(self._see, layer, views, _enough)
            blocks = self._quantise(layer, None, views, see, len(self._hidden))
            given = self._experts_gave(layer, views, blocks)
            yield blocks
            self._run(layer, views, self._hidden, partial(_given, given))

    def _layout_of(self, params: Sequence[Param]) -> LayerLayout:
        return LayerLayout(params, torch.float32, n_layers=self._config.n_layers)

    def _experts_gave(
        self, layer: int, views: Mapping[str, Weight], blocks: Blocks
    ) -> torch.Tensor:
        """(tokens, hidden_size), after they were quantised into `blocks`; of a layer without
        experts nothing."""
        if not any(p.n_experts and p.is_in(layer) for p in self._params):
            return torch.empty(0)
        asked: list[Routed] = []

        def note(_part: slice, routed: Routed) -> torch.Tensor:
            asked.append(Routed(*(t.clone() for t in routed)))
            raise _EnoughSeenError

        self._see(layer, views, note)
        routed = joined(asked)
        return run_experts(routed, shares(routed), partial(self._expert, layer, blocks))

    def _expert(self, layer: int, blocks: Blocks, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What it makes of its tokens x (n, hidden_size), quantised."""
        is_known = len(x) >= MIN_EXPERT_TOKENS
        source = self._checkpoint if is_known else self._target
        load_expert(source, self._layout, layer, expert, self._expert_memory)
        views = self._layout.expert_views(self._expert_memory, layer, expert)
        make = partial(self._family.expert, self._config, self._ops, views)
        parts = torch.split(x, PASS_TOKENS)

        def see() -> None:
            for part in parts:
                with suppress(_EnoughSeenError):
                    make(part)

        if is_known:
            blocks |= self._quantise(layer, expert, views, see, len(x))
        return torch.cat([make(part).clone() for part in parts])

    def _quantise(
        self,
        layer: int,
        expert: int | None,
        views: Mapping[str, Weight],
        see: Callable[[], None],
        n_tokens: int,
    ) -> Blocks:
        """The matrices in `views`, which there become what they are quantised to. `see` passes
        tokens, so many, through them."""
        blocks: Blocks = {}
        for param in self._params:
            if not param.is_in(layer) or expert not in param.owners:
                continue
            sources = [source_name(s, layer, expert) for s in param.sources]
            groups = self._groups(param, sources[0])
            if groups is None:
                continue
            w = views[param.name]
            assert isinstance(w, torch.Tensor)
            packed = groups.pack(self._rounded(layer, w, groups, see, n_tokens))
            w.t().copy_(groups.format.widen(packed))
            parts = torch.split(packed, list(param.source_rows))
            blocks |= dict(zip(sources, parts, strict=True))
        return blocks

    def _groups(self, param: Param, source: str) -> GroupFormat | None:
        return GROUP_FORMATS.get(self._target.format(source).name) if param.is_matrix else None

    def _rounded(
        self,
        layer: int,
        w: torch.Tensor,
        groups: GroupFormat,
        see: Callable[[], None],
        n_tokens: int,
    ) -> Grouped:
        self._ops.watch(w)
        see()
        hessian = self._ops.hessian.div_(n_tokens)
        self._ops.watched = None
        try:
            return gptq(w.contiguous(), hessian, groups.group)
        except UserError as error:
            raise UserError(f"layer {layer}: {error}") from None

    def _see(self, layer: int, views: Mapping[str, Weight], ask: Ask) -> None:
        self._run(layer, views, self._hidden.clone(), ask)

    def _run(self, layer: int, views: Mapping[str, Weight], hidden: torch.Tensor, ask: Ask) -> None:
        """Pass `hidden` (tokens, hidden_size) through the layer, in place."""
        n_part = max(1, PASS_TOKENS // self._length) * self._length
        for start in range(0, len(hidden), n_part):
            part = slice(start, start + n_part)
            ropes = [RopeTable(table.cos[part], table.sin[part]) for table in self._ropes]
            x = hidden[part]
            block = self._family.block(self._config, self._ops, layer, views, x, ropes)
            with suppress(_EnoughSeenError):
                run_block(block, self._attend, partial(ask, part))

    def _attend(self, new: NewTokens) -> torch.Tensor:
        q, k, v = (
            t.reshape(-1, self._length, *t.shape[1:]).transpose(1, 2) for t in (new.q, new.k, new.v)
        )
        positions = torch.arange(self._length)
        out = scored_attention(q, k, v, positions, positions, new.scoring)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _embedded(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        static = self._family.static_tensors(self._config)
        table = self._checkpoint.read(static["embed"][0])
        tokens = table[ids].float()
        names = {ours: source for ours, (source, _) in static.items()}
        others = {n: source for n, source in names.items() if n not in ("embed", "head")}
        w = load_static(self._checkpoint, others, torch.float32)
        states = self._family.hidden_states(self._config, self._ops, w, tokens, positions)
        return states.clone()  # not in a scratch buffer
