"""One step: every layer once, every sub-batch through each. The heart of the engine.

The double loop over layers and sub-batches is one sequence of cells. Before each cell its share
of the next layer's weights and its successor's KV prefix are queued; after it its new K and V
leave. With look-ahead 0 the same code is the serial twin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.core import StepPlan, SubBatchPlan
from sl_serve.device import Device
from sl_serve.kv.access import KVAccess
from sl_serve.kv.pool import Slab
from sl_serve.models import Family, RopeTable
from sl_serve.models.rope import inverse_frequencies, rope_table
from sl_serve.ops import Ops
from sl_serve.stats import BytesMoved
from sl_serve.weights.embedding import Embedding
from sl_serve.weights.layout import LayerWeights
from sl_serve.weights.streamer import WeightSource


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
    kv: KVAccess

    def __post_init__(self) -> None:
        rope = self.config.rope
        self._inverse = (
            self.device.upload(inverse_frequencies(rope, self.config.head_dim)) if rope else None
        )

    def run(self, plan: StepPlan, slabs: Mapping[int, Slab]) -> list[torch.Tensor]:
        """Hidden states after the last layer, (T, hidden) per sub-batch. K and V of every new
        token are in their slabs, or will be before the next step reads them."""
        sub_batches = plan.sub_batches
        n = len(sub_batches)
        self.kv.begin(sub_batches, slabs)
        hidden = [self._embed(s) for s in sub_batches]
        ropes = [self._rope(s) for s in sub_batches]
        for cell in range(self.config.n_layers * n):
            part = cell % n
            if part == 0:
                layer = self.weights.acquire()
            self.weights.advance(part, n)
            self._compute(cell, layer, hidden[part], ropes[part])
            if part == n - 1:
                self.weights.release()
        return hidden

    @property
    def bytes_moved(self) -> BytesMoved:
        return BytesMoved(self.weights.n_bytes_moved, self.kv.n_bytes_down, self.kv.n_bytes_up)

    def _compute(
        self, cell: int, layer: LayerWeights, x: torch.Tensor, rope: RopeTable | None
    ) -> None:
        region, table = self.kv.open(cell)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.ops.append(region, table, k, v)
            out = self.ops.attend(region, table, q, k.shape[1])
            self.kv.close(cell, k, v)
            return out

        self.family.block(self.config, self.ops, layer, x, rope, attend)
        n_flops = 2.0 * len(x) * sum(w.numel() for w in layer.values())
        self.device.computed(n_flops, (self.weights.buffer(),), "layer")

    def _embed(self, plan: SubBatchPlan) -> torch.Tensor:
        ids = [i for w in plan.rows for i in w.request.token_ids(w.start, w.stop)]
        table, rows = self.embedding.lookup(torch.tensor(ids))
        # Gathered on the host: what crosses the link is a line per token, not the table.
        tokens = self.device.upload(table[rows].to(self.ops.dtype))
        return self.family.hidden_states(
            self.config, self.ops, self.static, tokens, self._positions(plan)
        )

    def _rope(self, plan: SubBatchPlan) -> RopeTable | None:
        if self._inverse is None:
            return None
        return RopeTable(*rope_table(self._inverse, self._positions(plan)))

    def _positions(self, plan: SubBatchPlan) -> torch.Tensor:
        positions = torch.cat([torch.arange(w.start, w.stop) for w in plan.rows])
        return self.device.upload(positions)
