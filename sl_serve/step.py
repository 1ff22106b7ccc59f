"""One step: every layer once, every sub-batch through each. The heart of the engine.

The double loop over layers and sub-batches is one sequence of cells, cut in halves at their
attention (halves.py). Before each cell its share of the next layer's weights and its successor's
KV prefix are queued; after it its new K and V leave. With look-ahead 0 the same code is the serial
twin.

A layer's experts run once, over the tokens of all its cells, when the last one has come so far; but
cell by cell where cells of two layers alternate, or hidden states do not all stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sl_serve.config import ModelConfig
from sl_serve.core import StepPlan, SubBatchPlan
from sl_serve.device import Device, Stream
from sl_serve.expert_share import is_routed
from sl_serve.halves import halves
from sl_serve.hidden import HiddenStates
from sl_serve.kv.attention import Attention
from sl_serve.kv.pool import Slab
from sl_serve.models import Block, Family, RopeTable, Routed, begin, finish, go_on
from sl_serve.models.rope import Rotations
from sl_serve.ops import Ops
from sl_serve.routing import joined, run_experts, shares
from sl_serve.stats import BytesMoved
from sl_serve.weights.embedding import Embedding
from sl_serve.weights.layout import LayerWeights
from sl_serve.weights.source import WeightSource


class _Cell(NamedTuple):
    """Between its halves."""

    block: Block
    weights: torch.Tensor  # the memory that its second half reads
    n_flops: float  # of that half


class _Waiting(NamedTuple):
    """For its layer's experts, or for nothing but the other cells."""

    cell: int
    block: Block
    asked: Routed | None


@dataclass
class Sweep:
    """The parts that a step composes."""

    config: ModelConfig
    family: Family
    ops: Ops
    device: Device
    static: LayerWeights  # what the family has outside its layers, on the device
    embedding: Embedding
    weights: WeightSource
    attention: Attention
    hidden: HiddenStates

    def __post_init__(self) -> None:
        self._rotations = Rotations(self.config.ropes, self.config.head_dim, self.device.upload)

    def run(self, plan: StepPlan, slabs: Mapping[int, Slab]) -> Iterable[torch.Tensor]:
        """Hidden states after the last layer, (T, hidden) per sub-batch: all are to be taken, and
        each to be used up before the next. K and V of every new token are in their slabs, or will
        be before the next step reads them."""
        sub_batches = plan.sub_batches
        n = len(sub_batches)
        self.ops.same_order = plan.repeatable
        self.weights.begin(self._is_routed(plan))
        is_beside = self.attention.begin(sub_batches, slabs)
        self.hidden.begin(sub_batches, self._embed)
        is_joint = self.hidden.stay and not any(is_beside)
        ropes = [self._ropes(s) for s in sub_batches]
        cells: dict[int, _Cell] = {}  # by sub-batch
        waiting: list[_Waiting] = []
        for half in halves(self.config.n_layers, is_beside):
            part, cell = half.part, half.layer * n + half.part
            if half.is_first:
                if part == 0:
                    layer = self.weights.acquire()
                self.weights.advance(part, n)
                x = self.hidden.open(cell)
                cells[part] = self._start(cell, layer, x, ropes[part], is_beside)
            else:
                waiting.append(self._go_on(cell, cells.pop(part)))
                if half.ends_layer or not is_joint:
                    self._finish(half.layer, waiting)
                    waiting = []
            if half.ends_layer:
                self.weights.release()
        return self.hidden.results()

    def restart(self) -> None:
        """After `run` failed: nothing of that step is under way when this returns, and the next
        one finds everything as that one did, but for K and V that will be written again."""
        self.attention.restart()
        if not self.device.in_place:
            self._settle()
        self.weights.restart()
        self.hidden.restart()

    def _settle(self) -> None:
        """Every stream waits for what is queued on the others, and so does the host."""
        points = [self.device.record(stream) for stream in Stream]
        for point in points:
            for stream in Stream:
                self.device.wait(stream, point)
            self.device.synchronize(point)

    @property
    def bytes_moved(self) -> BytesMoved:
        return BytesMoved(
            weights=self.weights.n_bytes_moved,
            kv_down=self.attention.n_bytes_down,
            kv_up=self.attention.n_bytes_up,
            hidden_down=self.hidden.n_bytes_down,
            hidden_up=self.hidden.n_bytes_up,
        )

    def _start(
        self,
        cell: int,
        w: LayerWeights,
        x: torch.Tensor,
        ropes: Sequence[RopeTable],
        is_beside: Sequence[bool],
    ) -> _Cell:
        """`is_beside`: of each sub-batch, whether its attention is not the device's, so that the
        halves are told apart."""
        layer, part = divmod(cell, len(is_beside))
        memory = self.weights.buffer()
        block = self.family.block(self.config, self.ops, layer, w, x, ropes)
        new = begin(block)
        n_flops = 2.0 * len(x) * sum(p.numel() for p in w.values())
        if is_beside[part]:
            n_before = 2.0 * len(x) * self.config.hidden_size * _qkv_size(self.config)
            self.device.computed(n_before, (memory,), "projections")
            n_flops -= n_before
        self.attention.start(cell, *new)
        return _Cell(block, memory, n_flops)

    def _go_on(self, cell: int, started: _Cell) -> _Waiting:
        asked = go_on(started.block, self.attention.finish(cell))
        self.device.computed(started.n_flops, (started.weights,), "layer")
        if asked is not None:
            asked = asked._replace(hidden=asked.hidden.clone())  # others will use its buffer
        return _Waiting(cell, started.block, asked)

    def _finish(self, layer: int, waiting: Sequence[_Waiting]) -> None:
        asked = [w.asked for w in waiting if w.asked is not None]
        if asked:
            given = self._ask(layer, joined(asked))
            parts = torch.split_with_sizes(given, [len(a.hidden) for a in asked])
            for cell, of_cell in zip(waiting, parts, strict=True):
                finish(cell.block, of_cell)
        for cell in waiting:
            self.hidden.close(cell.cell)

    def _ask(self, layer: int, routed: Routed) -> torch.Tensor:
        """What the layer's experts give, (T, hidden)."""
        chosen = shares(routed)
        fetched = self.weights.experts(layer, [share.expert for share in chosen])
        expert, config, ops = self.family.expert, self.config, self.ops
        given = run_experts(
            routed, chosen, lambda number, x: expert(config, ops, fetched.weights[number], x)
        )
        n_flops = 2.0 * sum(
            len(share.tokens) * p.numel()
            for share in chosen
            for p in fetched.weights[share.expert].values()
        )
        self.device.computed(n_flops, fetched.memory, "experts")
        return given

    def _is_routed(self, plan: StepPlan) -> bool:
        return is_routed(plan.n_tokens, self.config.n_experts, self.config.experts_per_token)

    def _embed(self, plan: SubBatchPlan) -> torch.Tensor:
        ids = [i for w in plan.rows for i in w.request.token_ids(w.start, w.stop)]
        table, rows = self.embedding.lookup(torch.tensor(ids))
        # Gathered on the host: what crosses the link is a line per token, not the table.
        tokens = self.device.upload(table[rows].to(self.ops.dtype))
        return self.family.hidden_states(
            self.config, self.ops, self.static, tokens, self._positions(plan)
        )

    def _ropes(self, plan: SubBatchPlan) -> Sequence[RopeTable]:
        if not self._rotations:
            return ()
        lengths = torch.tensor([w.request.most_tokens for w in plan.rows])
        per_token = lengths.repeat_interleave(torch.tensor([w.n_new for w in plan.rows]))
        return self._rotations.tables(self._positions(plan), per_token)

    def _positions(self, plan: SubBatchPlan) -> torch.Tensor:
        positions = torch.cat([torch.arange(w.start, w.stop) for w in plan.rows])
        return self.device.upload(positions)


def _qkv_size(config: ModelConfig) -> int:
    return config.q_size + 2 * config.kv_size
