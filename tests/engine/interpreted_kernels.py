"""Run by test_triton_kernels.py with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from sl_serve import ops as ops_module
from sl_serve.device import SimDevice
from sl_serve.ops import torch_ops
from sl_serve.ops.device_ops import DeviceOps
from sl_serve.ops.triton.expand import DECODERS, TILE, expand_rows, expands
from sl_serve.ops.triton.kv import pack, scatter
from sl_serve.ops.triton_ops import TritonOps
from sl_serve.weights.formats import BLOCK_FORMATS, Format, plain
from sl_serve.weights.groups import GROUP_FORMATS
from sl_serve.weights.quantised import QuantisedRows, QuantisedWeight
from tests.engine.running import GREEDY, config, engine, run
from tests.engine.test_cuda_ops import CASES, Window
from tests.engine.test_gguf_weights import TOKENIZER, TOKENS
from tests.weights import groups
from tests.weights.blocks import (
    KINDS,
    SPECIAL_HALVES,
    Kind,
    put_halves,
    put_special_scales,
    random_rows,
)
from tests.weights.tiny_models import tiny_llama, write_tiny_gguf

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
each_group = pytest.mark.parametrize("name", GROUP_FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bits(numbers: torch.Tensor) -> torch.Tensor:
    """Any NaN is as good as any other."""
    kinds = {2: torch.int16, 4: torch.int32}
    return torch.where(numbers.isnan(), -1, numbers.view(kinds[numbers.dtype.itemsize]))


def dequantised(rows: np.ndarray, kind: Kind) -> torch.Tensor:
    """By the gguf package."""
    return torch.from_numpy(np.ascontiguousarray(gguf.dequantize(rows, kind)))


def expanded(rows: np.ndarray, kind: Kind, dtype: torch.dtype) -> torch.Tensor:
    return guarded(QuantisedRows(torch.from_numpy(rows), BLOCK_FORMATS[kind.name.lower()]), dtype)


def guarded(quantised: QuantisedRows, dtype: torch.dtype) -> torch.Tensor:
    # All bits set beside what is to be written.
    out = torch.full((quantised.shape[0] + 2, quantised.shape[1]), -1, dtype=torch.int32)
    out = out.view(dtype)[:, : quantised.shape[1]].contiguous()
    expand_rows(quantised, out[1:-1])
    assert out[0].isnan().all() and out[-1].isnan().all()
    return out[1:-1]


def test_every_format_has_a_kernel() -> None:
    assert set(DECODERS) == set(BLOCK_FORMATS) | set(GROUP_FORMATS)
    assert {kind.name.lower() for kind in KINDS} <= set(DECODERS)


@each_kind
@each_dtype
@pytest.mark.parametrize("shape", [(5, 512), (1, 2 * TILE + 256)], ids=str)
def test_random_blocks(kind: Kind, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows = random_rows(kind, *shape)
    found = expanded(rows, kind, dtype)
    assert torch.equal(bits(found), bits(dequantised(rows, kind).to(dtype)))
    assert 0.05 < float(found.abs().max()) < 1


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_special_scales(kind: Kind, dtype: torch.dtype) -> None:
    """Zero, largest, subnormal, infinite or no number, beside any bits; what is not finite in
    float32 becomes what torch rounds it to."""
    rows = random_rows(kind, len(SPECIAL_HALVES) ** 2, 256)
    put_special_scales(rows, kind)
    found = expanded(rows, kind, dtype)
    assert torch.equal(bits(found), bits(dequantised(rows, kind).to(dtype)))


def test_ties_go_to_even() -> None:
    """8-bit numbers times a scale of nine bits need more than bfloat16 has."""
    rows = random_rows(Kind.Q8_0, 8, 256)
    put_halves(rows.reshape(-1, 34), 0, np.array([1 + 2**-8]))
    exact = dequantised(rows, Kind.Q8_0)
    halfway = (bits(exact) & 0xFFFF) == 0x8000
    assert int(halfway.sum()) > 20
    found = expanded(rows, Kind.Q8_0, torch.bfloat16)
    assert torch.equal(bits(found), bits(exact.to(torch.bfloat16)))


@each_group
@each_dtype
def test_random_groups(name: str, dtype: torch.dtype) -> None:
    rows = groups.rows_of(name, 5, 384)
    found = guarded(rows, dtype)
    assert torch.equal(bits(found), bits(rows.widened().to(dtype)))
    assert 0.05 < float(found.abs().max()) < 1


@each_group
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_any_bits_of_a_group(name: str, dtype: torch.dtype) -> None:
    """Scales that are zero, subnormal, infinite or no number among them; every number of 8 bits."""
    format = GROUP_FORMATS[name].format
    random = np.random.default_rng(5)
    data = random.integers(0, 256, (64, format.row_bytes(256)), dtype=np.uint8)
    headers = data.reshape(-1, format.block_bytes)[:, :4]
    special = [0.0, -0.0, 1e-45, 1e-39, np.inf, -np.inf, np.nan, 3.4e38]
    for i, scale in enumerate(special):
        headers[i::16] = np.array([scale], "<f4").view(np.uint8)
    rows = QuantisedRows(torch.from_numpy(data), format)
    assert torch.equal(bits(guarded(rows, dtype)), bits(rows.widened().to(dtype)))


def ops(kind: type[DeviceOps], dtype: torch.dtype) -> DeviceOps:
    return kind(SimDevice(), dtype)


@each_dtype
def test_a_weight_of_parts_is_the_twins(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources in several formats, one without a kernel, by the same name on both."""
    monkeypatch.setattr(torch_ops, "EXPANDED_ELEMENTS", 600)  # the twin goes in several pieces
    strange = Format("strange", 32, 32, lambda b: b.float() - 100.0)
    data = [torch.from_numpy(random_rows(k, 3, 256)) for k in (Kind.Q6_K, Kind.Q4_1)]
    bytes_ = torch.arange(4 * 256, dtype=torch.int32).to(torch.uint8).view(4, 256)
    parts = (
        QuantisedRows(data[0], BLOCK_FORMATS["q6_k"]),
        QuantisedRows(bytes_, strange),
        QuantisedRows(torch.randn(2, 256).view(torch.uint8), plain(torch.float32)),
        QuantisedRows(data[1], BLOCK_FORMATS["q4_1"]),
    )
    assert [expands(p) for p in parts] == [True, False, False, True]
    weight, outs = QuantisedWeight(parts), []
    for kind in (DeviceOps, TritonOps):
        outs.append(torch.full((12, 256), torch.nan, dtype=dtype))
        ops(kind, dtype).expand(weight, outs[-1].t())
    together = torch.cat([p.widened() for p in parts]).to(dtype)
    assert torch.equal(outs[0], together) and torch.equal(outs[1], together)


def test_the_check_passes_and_finds_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        TritonOps(SimDevice(), dtype).check()
    monkeypatch.setattr(TritonOps, "_expand_rows", lambda _self, _rows, out: out.zero_())
    with pytest.raises(RuntimeError, match="other numbers"):
        TritonOps(SimDevice(), torch.float32).check()


@each_dtype
@pytest.mark.parametrize(("n_tokens", "heads", "head_dim"), [(1, 1, 16), (5, 2, 40), (3, 9, 128)])
def test_new_tokens_are_packed_as_torch_stacks_them(
    n_tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Out of the columns of one product."""
    fused = torch.randn(n_tokens, 4 * heads, head_dim).to(dtype)
    k, v = fused[:, 2 * heads : 3 * heads], fused[:, 3 * heads :]
    out = torch.full((n_tokens, 2, heads, head_dim), torch.nan, dtype=dtype)
    pack(k, v, out)
    assert torch.equal(out, torch.stack((k, v), dim=1))


@each_dtype
def test_new_tokens_go_to_their_lines_and_nowhere_else(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    lines = torch.randn(40, 2, 24, generator=random).to(dtype)
    fused = torch.randn(7, 6, 24, generator=random).to(dtype)
    k, v = fused[:, 2:4], fused[:, 4:]
    targets = torch.randperm(40, generator=random)[:14].view(2, 7)
    expected = lines.clone()
    expected.index_copy_(0, targets[0], k).index_copy_(0, targets[1], v)
    scatter(k, v, targets, lines)
    assert torch.equal(lines, expected)


@pytest.mark.parametrize("case", ["several slabs", "decode between prompts"])
def test_attention_over_what_the_kernels_wrote_is_the_twins(case: str) -> None:
    found = [
        Window(CASES[case], 2, 2).attended(ops(k, torch.float32)) for k in (DeviceOps, TritonOps)
    ]
    assert torch.equal(*found)


def test_an_engine_with_the_kernels_gives_the_twins_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, packing and windows together, in a few steps."""
    path = tmp_path / "tiny.gguf"
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 64}
    write_tiny_gguf(path, tiny_llama(**sizes), quantisation=Kind.Q4_1, settings=TOKENIZER)
    prompts, short = [[1, 2, 3], [4, 5, 6, 7, 8]], replace(GREEDY, max_tokens=3)
    said = []
    for maker in (DeviceOps, TritonOps):
        monkeypatch.setattr(ops_module, "_device_ops", maker)
        with engine(path, config(max_rows=2, n_sub_batches=2), SimDevice()) as running:
            said.append(run(running, prompts, short))
    assert said[0] == said[1]
