"""What the processor makes of a layer and of the head: each part timed with the very operations
that the engine uses, on shapes of the model in question."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from sl_serve.config import DTypeName, KVDTypeName, ModelConfig
from sl_serve.host_memory import host_empty
from sl_serve.kv.formats import KVFormat, kv_format
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.rows import RowTable
from sl_serve.models import NewTokens, RopeTable, Routed, load_family, run_block
from sl_serve.ops import KVRegion, Ops
from sl_serve.plan.activations import fit_activations
from sl_serve.plan.budget import MIB
from sl_serve.plan.hardware import AttentionRates, MatmulRates
from sl_serve.sampling import best_tokens
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.layout import Param, largest_layer, source_name
from sl_serve.weights.quantised import QuantisedRows, Rows, Weight

MATMUL_ROWS = (1, 4, 16, 64, 256, 1024)
HEAD_ROWS = (1, 16, 64, 256)
# Weights, or K and V, of one sweep: more than caches hold, little enough for a second.
SWEEP_BYTES = 192 * MIB
CONTEXT_TOKENS = 256  # of attention's rows
ATTENTION_ROWS = 256  # at most
PREFILL_ROWS = 4
ELEMENTWISE_TOKENS = 1024
MEASURED_SECONDS = 0.4  # per figure, at least three rounds


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of which model, and in what dtypes, is to be timed."""

    model: ModelConfig
    stored: torch.dtype
    compute: DTypeName
    formats: Mapping[str, Format] = field(default_factory=dict)  # by checkpoint name, if not stored
    kv_dtype: KVDTypeName = "auto"

    @property
    def kv(self) -> KVFormat:
        return kv_format(self.kv_dtype, self.compute)

    def format(self, source: str) -> Format:
        return self.formats.get(source, plain(self.stored))

    def format_of(self, param: Param) -> Format:
        """That of its first source: layers, experts and sources differ little."""
        layer = min(param.layers or [0])
        return self.format(source_name(param.sources[0], layer, 0))


def matmul_rates(ops: Ops, shapes: Shapes) -> MatmulRates:
    """FLOP/s of one layer's products by rows, over as many distinct layers as SWEEP_BYTES allow;
    very wide matrices are timed over a part of their outputs."""
    params = products_of(shapes.model)
    layer_bytes = sum(p.shape[1] * shapes.format_of(p).row_bytes(p.shape[0]) for p in params)
    part = min(1.0, SWEEP_BYTES / layer_bytes)
    n_layers = max(1, min(shapes.model.n_layers, int(SWEEP_BYTES / layer_bytes)))
    layers = [[_weight(p, part, shapes.format_of(p)) for p in params] for _ in range(n_layers)]
    return MatmulRates(tuple((rows, _rate(ops, layers, rows)) for rows in MATMUL_ROWS))


def products_of(model: ModelConfig) -> list[Param]:
    """The matrices of a layer with the most elements that a token is multiplied with. Those of an
    expert stand for it as often as a token is given one: each has memory of its own."""
    params = load_family(model.family).layer_params(model)
    layer = largest_layer(params, model.n_layers)
    return [
        p
        for p in params
        if p.is_matrix and p.is_in(layer)
        for _ in range(model.experts_per_token if p.n_experts else 1)
    ]


def _weight(param: Param, part: float, format: Format) -> Weight:
    n_in, n_out = param.shape
    return _rows_of(format, max(1, int(n_out * part)), n_in).t()


def _rows_of(format: Format, n_rows: int, n_in: int) -> Rows:
    """Small numbers, in any format. Zeros would share one page until they are written, and then be
    read from cache."""
    data = torch.full((n_rows, format.row_bytes(n_in)), 0x11, dtype=torch.uint8)
    return QuantisedRows(data, format) if format.dtype is None else data.view(format.dtype)


def _rate(ops: Ops, layers: list[list[Weight]], rows: int) -> float:
    inputs = {len(w): torch.ones(rows, len(w), dtype=ops.dtype) for w in layers[0]}

    def sweep() -> None:
        for layer in layers:
            for w in layer:
                ops.linear("probe", inputs[len(w)], w, None)

    n_flops = 2.0 * rows * len(layers) * sum(w.numel() for w in layers[0])
    return n_flops / typical_seconds(sweep)


def head_rates(ops: Ops, shapes: Shapes) -> MatmulRates:
    """FLOP/s of the vocabulary matrix's product by rows, choosing the best tokens included."""
    vocabulary = shapes.model.vocab_size
    source, (_, width) = load_family(shapes.model.family).static_tensors(shapes.model)["head"]
    format = shapes.format(source)
    n = min(vocabulary, SWEEP_BYTES // format.row_bytes(width))
    head = _rows_of(format, n, width)
    out = torch.empty(max(HEAD_ROWS), n, dtype=ops.dtype)

    def rate(rows: int) -> float:
        x = torch.ones(rows, width, dtype=ops.dtype)

        def choose() -> None:
            ops.logits(x, head, out[:rows])
            best_tokens(out[:rows].float())

        return 2.0 * rows * n * width / typical_seconds(choose)

    return MatmulRates(tuple((rows, rate(rows)) for rows in HEAD_ROWS))


def attention_rates(ops: Ops, model: ModelConfig, format: KVFormat) -> AttentionRates:
    """From two probes: whole prompts, and one new token for each of many rows."""
    q_flops = 4.0 * model.q_size
    prompts = _rows(format, model, PREFILL_ROWS, CONTEXT_TOKENS)
    n_pairs = PREFILL_ROWS * CONTEXT_TOKENS * (CONTEXT_TOKENS + 1) / 2
    flops_per_s = n_pairs * q_flops / _attention_seconds(ops, model, prompts)
    row_bytes = CONTEXT_TOKENS * model.n_kv_lines * format.line_bytes(model.head_dim)
    n_rows = max(1, min(ATTENTION_ROWS, SWEEP_BYTES // row_bytes))
    seconds = _attention_seconds(ops, model, _rows(format, model, n_rows, 1))
    arithmetic_s = n_rows * CONTEXT_TOKENS * q_flops / flops_per_s
    reading_s = max(seconds - arithmetic_s, 0.01 * seconds)
    return AttentionRates(n_rows * row_bytes / reading_s, flops_per_s)


def _attention_seconds(ops: Ops, model: ModelConfig, rows: _Rows) -> float:
    q = torch.ones(rows.n_tokens, model.n_heads, model.head_dim, dtype=ops.dtype)
    return typical_seconds(lambda: ops.attend(rows.region, rows.table, q, model.n_kv_heads))


class CellRates(NamedTuple):
    """A layer's pass over a sub-batch, beside products and attention over long contexts."""

    elementwise_bytes_per_s: float
    overhead_s: float


def cell_rates(ops: Ops, model: ModelConfig, format: KVFormat) -> CellRates:
    """From a pass of many tokens and one of a single token."""
    n = ELEMENTWISE_TOKENS
    one_s, many_s = (_cell_seconds(ops, model, format, tokens) for tokens in (1, n))
    bytes_per_token = fit_activations(model, ops.dtype).per_token
    bytes_per_token += model.n_kv_lines * format.line_bytes(model.head_dim)
    growth_s = max(many_s - one_s, 0.01 * many_s)
    alone = _attention_seconds(ops, model, _rows(format, model, 1, 1, context=1))
    return CellRates((n - 1) * bytes_per_token / growth_s, one_s + alone)


def _cell_seconds(ops: Ops, model: ModelConfig, format: KVFormat, n_tokens: int) -> float:
    """Norms, activation functions, rotations, new K and V."""
    family = load_family(model.family)
    params = family.layer_params(model)
    layer = largest_layer(params, model.n_layers)
    weights = {
        # Matrices take no memory: nearly all are only looked at.
        p.name: torch.ones(1, dtype=ops.dtype).expand(p.shape)
        if p.is_matrix
        else torch.ones(p.shape, dtype=ops.dtype)
        for p in params
        if p.is_in(layer) and not p.n_experts
    }
    x = torch.ones(n_tokens, model.hidden_size, dtype=ops.dtype)
    attended = torch.ones(n_tokens, model.q_size, dtype=ops.dtype)
    ropes = [RopeTable(*torch.ones(2, n_tokens, n)) for n in model.rotated_pairs]
    rows = _rows(format, model, n_tokens, 1, context=16)
    without_products = cast(Ops, _WithoutProducts(ops))

    def attend(new: NewTokens) -> torch.Tensor:
        ops.append(rows.region, rows.table, new.k, new.v)
        return attended

    def ask(routed: Routed) -> torch.Tensor:
        return routed.hidden

    return typical_seconds(
        lambda: run_block(
            family.block(model, without_products, layer, weights, x, ropes), attend, ask
        )
    )


class _WithoutProducts:
    """Operations whose matrix products cost nothing and give the same ones each time."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._outputs: dict[str, torch.Tensor] = {}

    def linear(self, name: str, x: torch.Tensor, w: torch.Tensor, _bias: object) -> torch.Tensor:
        if name not in self._outputs:
            self._outputs[name] = torch.ones(len(x), w.shape[1], dtype=x.dtype)
        return self._outputs[name]

    def add_linear_(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


class _Rows(NamedTuple):
    """Rows of one layer, their contexts of equal length, in memory as the engine's."""

    region: KVRegion
    table: RowTable
    n_tokens: int  # new ones, of all rows


def _rows(
    format: KVFormat, model: ModelConfig, n_rows: int, n_new: int, context: int = CONTEXT_TOKENS
) -> _Rows:
    spec = KVSpec(
        1,
        model.n_kv_heads,
        model.head_dim,
        format,
        context,
        order="row",
        n_kinds=model.n_kv_kinds,
    )
    memory = host_empty(n_rows * spec.chunk_bytes)
    # Small numbers in any format. Zeros would share one page, and then be read from cache.
    memory.fill_(0x11)
    strides, index = spec.strides(1), np.arange(n_rows, dtype=np.int64)
    columns = (
        index * n_new,
        n_new,
        context - n_new,
        context,
        index,
        strides.kv,
        strides.head,
        strides.position,
    )
    rows = np.stack([np.broadcast_to(c, n_rows) for c in columns], axis=1)
    table = RowTable(np.ascontiguousarray(rows), index * spec.chunk_bytes, format)
    return _Rows(KVRegion(memory, 0), table, n_rows * n_new)


def typical_seconds(act: Callable[[], object]) -> float:
    """The median of some rounds: what other programs take away they take from the engine too."""
    act()  # touches memory, fills caches of code
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < MEASURED_SECONDS:
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
