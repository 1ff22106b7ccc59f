from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sl_serve.core import Request, RowWork, SamplingParams
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.layout import KVOrder, KVSpec
from sl_serve.kv.pool import Slab
from sl_serve.kv.rows import RowTable, row_table
from sl_serve.ops import KVRegion, Ops, Scoring, TorchOps
from sl_serve.ops.kv_lines import write_lines
from sl_serve.ops.native_ops import NativeOps
from sl_serve.ops.protocol import CAUSAL

pytestmark = pytest.mark.usefixtures("one_thread")

try:
    from sl_serve._native import targets
except ImportError:  # no compiler: the pure-torch twins are all there is
    targets = list

NATIVE = targets()
MAKERS: dict[str, Callable[[], Ops]] = {"torch": TorchOps}
MAKERS |= {f"native-{t}": lambda t=t: NativeOps(1, t) for t in NATIVE}  # type: ignore[misc]

Array = NDArray[np.float64]
N_LAYERS, LAYER = 2, 1  # the region under test has neighbours on both sides
CHUNK_TOKENS = 64
# Slab width -> (cached, new) tokens of rows; decode rows have one new token. Contexts cross softmax
# blocks of 64 positions and chunks, prefill chunks cross 32 tokens, some rows stay free.
SLABS = [
    (1, [(0, 70)]),
    (1, [(150, 1)]),
    (2, [(33, 40), (129, 1)]),
    (4, [(0, 1), (63, 1), (64, 33)]),
    (8, [(15, 1), (16, 5), (7, 2)]),
    (64, [(0, 3), (1, 1)]),
]


@pytest.fixture(params=MAKERS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return MAKERS[request.param]()


@dataclass
class Batch:
    """A sub-batch over slabs of unlike widths that share one memory, and what it knows.

    Memory is NaN wherever no row has a token, so that any read beside the rows shows.
    """

    order: KVOrder
    n_kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    kv: str | None = None  # name of the format; None: as dtype
    seed: int = 0
    scoring: Scoring = CAUSAL
    works: list[RowWork] = field(default_factory=list)
    slabs: dict[int, Slab] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.format = KV_FORMATS[self.kv or str(self.dtype).removeprefix("torch.")]
        self.spec = KVSpec(
            N_LAYERS,
            self.n_kv_heads,
            self.head_dim,
            self.format,
            CHUNK_TOKENS,
            self.order,
        )
        n_chunks = self._open_slabs()
        self.memory = torch.full((n_chunks * self.spec.chunk_bytes,), 0xFF, dtype=torch.uint8)
        self.past = [self._random(w.start, 2, self.n_kv_heads) for w in self.works]
        for work, tokens in zip(self.works, self.past, strict=True):
            self.poke(self.memory, work, 0, tokens)
        n_tokens = sum(w.n_new for w in self.works)
        self.fused = self._random(n_tokens, (self.group + 2) * self.n_kv_heads)

    def _open_slabs(self) -> int:
        n_chunks_of = [-(-max(map(sum, rows)) * width // CHUNK_TOKENS) for width, rows in SLABS]
        ids = self.rng.permutation(sum(n_chunks_of)).tolist()
        for slab_id, (width, rows) in enumerate(SLABS):
            slab = Slab(slab_id, width, CHUNK_TOKENS // width)
            slab.chunks = [ids.pop() for _ in range(n_chunks_of[slab_id])]
            self.slabs[slab_id] = slab
            for i, (start, n_new) in enumerate(rows, start=1):
                self._add(slab, width - i, start, n_new)
        self.rng.shuffle(self.works)
        return sum(n_chunks_of)

    def _add(self, slab: Slab, row: int, start: int, n_new: int) -> None:
        request = Request(f"{slab.slab_id}-{row}", [0] * (start + n_new), SamplingParams(), print)
        slab.rows[row] = request
        self.works.append(RowWork(request, slab.slab_id, row, start, n_new, samples=True))

    def _random(self, n_tokens: int, *heads: int) -> torch.Tensor:
        numbers = self.rng.standard_normal((n_tokens, *heads, self.head_dim), dtype=np.float32)
        return torch.from_numpy(numbers).to(self.dtype)

    def poke(self, memory: torch.Tensor, work: RowWork, start: int, kv: torch.Tensor) -> None:
        """Write tokens (T, 2, Hk, D) from position `start` on, head by head."""
        slab, strides = self.slabs[work.slab], self.spec.strides(self.slabs[work.slab].width)
        target = memory.numpy()
        for position, raw in enumerate(write_lines(kv, self.format).numpy(), start):
            chunk, within = divmod(position, slab.positions_per_chunk)
            at = slab.chunks[chunk] * self.spec.chunk_bytes + LAYER * self.spec.chunk_layer_bytes
            at += within * strides.position + work.row * strides.row
            for which, head in np.ndindex(2, self.n_kv_heads):
                begin = at + which * strides.kv + head * strides.head
                target[begin : begin + raw.shape[2]] = raw[which, head]

    @property
    def region(self) -> KVRegion:
        return KVRegion(self.memory, LAYER * self.spec.chunk_layer_bytes)

    @property
    def table(self) -> RowTable:
        offsets = {i: [c * self.spec.chunk_bytes for c in s.chunks] for i, s in self.slabs.items()}
        return row_table(self.spec, self.works, self.slabs, offsets)

    @property
    def q(self) -> torch.Tensor:
        return self.fused[:, : self.group * self.n_kv_heads]

    @property
    def k(self) -> torch.Tensor:
        return self.fused[:, self.group * self.n_kv_heads : (self.group + 1) * self.n_kv_heads]

    @property
    def v(self) -> torch.Tensor:
        return self.fused[:, (self.group + 1) * self.n_kv_heads :]

    @property
    def new_tokens(self) -> list[torch.Tensor]:
        """K and V (T, 2, Hk, D) of each row's new tokens."""
        return list(torch.stack((self.k, self.v), dim=1).split([w.n_new for w in self.works]))

    def expected_attention(self) -> Array:
        """(T, Hq * D) in float64."""
        queries = self.q.double().split([w.n_new for w in self.works])
        rows = zip(queries, self.past, self.new_tokens, strict=True)
        out = [
            causal(q.numpy(), self.kept(torch.cat((past, new))), self.scoring)
            for q, past, new in rows
        ]
        return np.concatenate(out)

    def kept(self, kv: torch.Tensor) -> Array:
        """K and V as they come back from memory, by another package's arithmetic."""
        if self.format.block_elements == 1:
            return kv.to(getattr(torch, self.format.name)).double().numpy()
        raw = write_lines(kv, self.format).numpy()
        numbers = gguf.dequantize(raw, gguf.GGMLQuantizationType[self.format.blocks.upper()])
        return numbers[..., : self.head_dim].astype(np.float64)


def causal(q: Array, kv: Array, scoring: Scoring = CAUSAL) -> Array:
    """Softmax over every token up to the query's own, which are the last of kv.

    q (T, Hq, D), kv (positions, 2, Hk, D) -> (T, Hq * D).
    """
    n_new, n_heads, head_dim = q.shape
    n_context = len(kv)
    k, v = (np.repeat(kv[:, i], n_heads // kv.shape[2], axis=1) for i in range(2))
    scale = 1 / np.sqrt(head_dim) if scoring.scale is None else scoring.scale
    scores = np.einsum("thd,phd->thp", q, k) * scale
    if scoring.softcap is not None:
        scores = scoring.softcap * np.tanh(scores / scoring.softcap)
    for t in range(n_new):
        own = n_context - n_new + t
        if scoring.slopes is not None:
            distance = np.arange(n_context) - own
            scores[t] += scoring.slopes.double().numpy()[:, None] * distance
        scores[t, :, own + 1 :] = -np.inf
        if scoring.window is not None:
            scores[t, :, : max(0, own + 1 - scoring.window)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    out: Array = np.einsum("thp,phd->thd", weights, v).reshape(n_new, -1)
    return out


def relative_error(actual: torch.Tensor, expected: Array) -> float:
    """Largest difference, relative to the largest magnitude."""
    assert tuple(actual.shape) == expected.shape
    found = actual.double().numpy()
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def append_and_attend(ops: Ops, batch: Batch) -> torch.Tensor:
    ops.append(batch.region, batch.table, batch.k, batch.v)
    out = ops.attend(batch.region, batch.table, batch.q, batch.n_kv_heads, batch.scoring)
    return out.clone()  # the next call uses its memory again


both_orders = pytest.mark.parametrize("order", ["position", "row"])
HEADS = [(n_kv, group) for n_kv, group in [(3, 1), (2, 2), (1, 3), (2, 4), (1, 5), (2, 8)]]


@both_orders
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 80, 96, 128])
@pytest.mark.parametrize(("n_kv_heads", "group"), HEADS)
def test_attention_over_what_was_appended_is_exact(
    ops: Ops, order: KVOrder, n_kv_heads: int, group: int, head_dim: int
) -> None:
    batch = Batch(order, n_kv_heads, group, head_dim)
    assert relative_error(append_and_attend(ops, batch), batch.expected_attention()) <= 1e-5


@both_orders
@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_append_writes_the_new_tokens_and_nothing_else(
    ops: Ops, order: KVOrder, head_dim: int
) -> None:
    batch = Batch(order, 3, 1, head_dim)
    expected = batch.memory.clone()
    for work, tokens in zip(batch.works, batch.new_tokens, strict=True):
        batch.poke(expected, work, work.start, tokens)
    ops.append(batch.region, batch.table, batch.k, batch.v)
    assert torch.equal(batch.memory, expected)


def test_attention_writes_nothing_to_memory(ops: Ops) -> None:
    batch = Batch("row", 2, 2, 16)
    ops.append(batch.region, batch.table, batch.k, batch.v)
    before, fused = batch.memory.clone(), batch.fused.clone()
    ops.attend(batch.region, batch.table, batch.q, 2)
    assert torch.equal(batch.memory, before)
    assert torch.equal(batch.fused, fused)


def test_contiguous_tensors_give_the_same_as_slices(ops: Ops) -> None:
    batch = Batch("position", 2, 3, 64)
    expected = append_and_attend(ops, batch)
    whole = Batch("position", 2, 3, 64)
    k, v = whole.k.contiguous(), whole.v.contiguous()
    ops.append(whole.region, whole.table, k, v)
    assert torch.equal(whole.memory, batch.memory)
    out = ops.attend(whole.region, whole.table, whole.q.contiguous(), 2)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@both_orders
@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize(("scale", "tolerance"), [(30.0, 1e-4), (1000.0, 1e-2)])
def test_scores_of_a_large_range_stay_finite_and_right(
    ops: Ops, order: KVOrder, head_dim: int, scale: float, tolerance: float
) -> None:
    batch = Batch(order, 2, 4, head_dim)
    batch.q.mul_(scale)  # a float32 score of `scale` * 4 has an error of about tolerance / 20
    assert relative_error(append_and_attend(ops, batch), batch.expected_attention()) <= tolerance


@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_scores_far_from_zero_give_the_same_weights(ops: Ops, shift: float) -> None:
    batch = Batch("row", 1, 2, 16)
    # One dimension adds the same to all scores of a query; in exact arithmetic it cancels out.
    batch.q[..., 0], batch.k[..., 0] = 4.0, shift
    for work, past in zip(batch.works, batch.past, strict=True):
        past[:, 0, :, 0] = shift
        batch.poke(batch.memory, work, 0, past)
    assert relative_error(append_and_attend(ops, batch), batch.expected_attention()) <= 1e-3


@pytest.mark.parametrize("direction", [1, -1])
def test_a_maximum_that_moves_with_every_position_is_followed(ops: Ops, direction: int) -> None:
    batch = Batch("row", 1, 2, 16)
    batch.q.zero_()
    batch.q[..., 0] = 4.0  # the score is the key's first number
    line = 0
    for work, past in zip(batch.works, batch.past, strict=True):
        ramp = direction * torch.arange(work.stop, dtype=torch.float32)[:, None]
        past[:, 0, :, 0] = ramp[: work.start]
        batch.k[line : line + work.n_new, :, 0] = ramp[work.start :]
        batch.poke(batch.memory, work, 0, past)
        line += work.n_new
    assert relative_error(append_and_attend(ops, batch), batch.expected_attention()) <= 1e-5


def test_a_rows_attention_does_not_depend_on_its_neighbours(ops: Ops) -> None:
    batch = Batch("row", 2, 2, 64)
    together = append_and_attend(ops, batch).split([w.n_new for w in batch.works])
    queries = batch.q.split([w.n_new for w in batch.works])
    for work, q, expected in zip(list(batch.works), queries, together, strict=True):
        batch.works = [work]
        assert torch.equal(ops.attend(batch.region, batch.table, q, 2), expected)


@both_orders
@pytest.mark.parametrize(("n_kv_heads", "group", "head_dim"), [(2, 4, 64), (1, 3, 40)])
def test_bfloat16_attention_is_right_within_its_resolution(
    order: KVOrder, n_kv_heads: int, group: int, head_dim: int
) -> None:
    batch = Batch(order, n_kv_heads, group, head_dim, torch.bfloat16)
    out = append_and_attend(TorchOps(), batch)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, batch.expected_attention()) <= 2**-7


# The other operations.


def test_rope_is_a_complex_rotation_of_half_pairs(ops: Ops) -> None:
    rng = np.random.default_rng(2)
    n_tokens, n_heads, head_dim = 9, 5, 20
    fused = torch.from_numpy(rng.standard_normal((n_tokens, n_heads + 2, head_dim))).float()
    before = fused.clone()
    angles = torch.from_numpy(rng.uniform(-4, 4, (n_tokens, head_dim // 2))).float()
    ops.rope_(fused[:, :n_heads], angles.cos(), angles.sin())
    pairs = before[:, :n_heads].double().numpy()
    turned = (pairs[..., :10] + 1j * pairs[..., 10:]) * np.exp(1j * angles.double().numpy())[
        :, None
    ]
    expected = np.concatenate((turned.real, turned.imag), axis=-1)
    assert relative_error(fused[:, :n_heads], expected) <= 1e-6
    assert torch.equal(fused[:, n_heads:], before[:, n_heads:])


WIDTHS = [1, 7, 16, 17, 31, 48, 100, 577]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_is_exact(ops: Ops, width: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((5, width)) * 3
    x[1] *= 1e-4  # where eps counts
    x, weight = x.astype(np.float32), torch.from_numpy(rng.standard_normal(width)).to(dtype)
    exact = x.astype(np.float64)
    expected = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5)
    expected = expected * weight.double().numpy()
    out = ops.rms_norm(torch.from_numpy(x), weight, 1e-5)
    assert out.dtype == torch.float32
    for line in range(5):
        assert relative_error(out[line], expected[line]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_is_exact(ops: Ops, width: int, dtype: torch.dtype) -> None:
    """With weights shorter than what they are applied to, too."""
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((5, width)) * 3 + 10).astype(np.float32)
    weight, bias = (torch.from_numpy(rng.standard_normal(width)).to(dtype) for _ in range(2))
    exact = x.astype(np.float64)
    centred = exact - exact.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    expected = expected * weight.double().numpy() + bias.double().numpy()
    out = ops.layer_norm(torch.from_numpy(x), weight, bias, 1e-5)
    assert out.dtype == torch.float32
    for line in range(5):
        assert relative_error(out[line], expected[line]) <= 3e-6


def test_relu_is_in_place(ops: Ops) -> None:
    x = torch.tensor([[-1.0, 0.0, 2.5], [3.0, -0.1, -1e9]])
    ops.relu_(x)
    assert x.tolist() == [[0.0, 0.0, 2.5], [3.0, 0.0, 0.0]]


def silu(x: Array) -> Array:
    out: Array = x / (1 + np.exp(-x))
    return out


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul_is_exact(ops: Ops, width: int) -> None:
    rng = np.random.default_rng(width)
    gate_up = rng.standard_normal((5, 2 * width)).astype(np.float32) * 4
    exact = gate_up.astype(np.float64)
    expected = silu(exact[:, :width]) * exact[:, width:]
    assert relative_error(ops.silu_mul(torch.from_numpy(gate_up)), expected) <= 1e-6


@pytest.mark.parametrize("width", [16, 17, 100])
def test_silu_is_accurate_number_by_number_over_its_range(ops: Ops, width: int) -> None:
    gates = np.linspace(-85, 85, 8 * width, dtype=np.float32).reshape(8, width)
    gate_up = torch.from_numpy(np.concatenate((gates, np.ones_like(gates)), axis=1))
    expected = silu(gates.astype(np.float64))
    np.testing.assert_allclose(ops.silu_mul(gate_up).numpy(), expected, rtol=2e-6)


@pytest.mark.parametrize("width", [16, 17])
@pytest.mark.parametrize(("gate", "expected"), [(100, 100), (-100, 0), (1e4, 1e4), (-1e4, 0)])
def test_silu_of_large_numbers(ops: Ops, width: int, gate: float, expected: float) -> None:
    gate_up = torch.cat((torch.full((2, width), float(gate)), torch.ones(2, width)), dim=1)
    np.testing.assert_allclose(ops.silu_mul(gate_up).numpy(), expected, rtol=1e-6, atol=1e-30)


# The native core alone.


@pytest.mark.parametrize("target", NATIVE)
def test_results_do_not_depend_on_the_number_of_threads(target: str) -> None:
    def results(n_threads: int) -> list[torch.Tensor]:
        ops, batch = NativeOps(n_threads, target), Batch("row", 2, 5, 40)
        out = append_and_attend(ops, batch)
        gate_up = torch.randn(40, 202, generator=torch.Generator().manual_seed(0))
        turned = batch.fused.clone()
        angles = torch.linspace(-3, 3, len(turned) * 20).view(-1, 20)
        ops.rope_(turned, angles.cos(), angles.sin())
        normed = ops.rms_norm(gate_up, torch.ones(202), 1e-6)
        return [batch.memory, out, ops.silu_mul(gate_up), normed, turned]

    one = results(1)
    for n_threads in (2, 3):
        for expected, actual in zip(one, results(n_threads), strict=True):
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("target", NATIVE[:1])
def test_the_native_core_refuses_a_tensor_that_is_not_the_tables(target: str) -> None:
    ops, batch = NativeOps(1, target), Batch("row", 2, 1, 16)
    with pytest.raises(AssertionError, match="table's tokens"):
        ops.append(batch.region, batch.table, batch.k[:-1], batch.v[:-1])
    with pytest.raises(AssertionError, match="side by side"):
        ops.attend(batch.region, batch.table, batch.fused[:, ::2][:, :2], 2)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
def test_an_unknown_target_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sse9"):
        NativeOps(1, "sse9")
