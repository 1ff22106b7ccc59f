"""KV in formats shorter than what is computed with: written, read back, attended to."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from sl_serve.kv.formats import KV_FORMATS, KVFormat
from sl_serve.kv.layout import KVOrder
from sl_serve.ops import KVRegion, Ops, Scoring
from sl_serve.ops.kv_lines import read_lines, write_lines
from sl_serve.ops.native_ops import NativeOps
from tests.engine.test_ops import (
    HEADS,
    MAKERS,
    NATIVE,
    Batch,
    append_and_attend,
    causal,
    relative_error,
)

# Of results over numbers drawn from a normal distribution, relative to the largest.
ERRORS = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10, "int8": 0.01, "int4": 0.12}
SHORT = [name for name in KV_FORMATS if name != "float32"]
BLOCKS = [f for f in KV_FORMATS.values() if f.block_elements > 1]
every_short = pytest.mark.parametrize("kv", SHORT)
every_block = pytest.mark.parametrize("format", BLOCKS, ids=lambda f: f.name)


@pytest.fixture(params=MAKERS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return MAKERS[request.param]()


@every_short
@pytest.mark.parametrize(
    ("head_dim", "order"), [(40, "row"), (64, "position"), (96, "row"), (128, "row"), (256, "row")]
)
@pytest.mark.parametrize(("n_kv_heads", "group"), [(2, 2)])
def test_attention_is_that_over_what_memory_holds(
    ops: Ops, kv: str, n_kv_heads: int, group: int, head_dim: int, order: KVOrder
) -> None:
    batch = Batch(order, n_kv_heads, group, head_dim, kv=kv)
    assert relative_error(append_and_attend(ops, batch), batch.expected_attention()) <= 1e-5


@pytest.mark.parametrize("kv", ["bfloat16", "int4"])
@pytest.mark.parametrize(("n_kv_heads", "group"), HEADS)
def test_every_number_of_heads(ops: Ops, kv: str, n_kv_heads: int, group: int) -> None:
    batch = Batch("row", n_kv_heads, group, 64, kv=kv)
    assert relative_error(append_and_attend(ops, batch), batch.expected_attention()) <= 1e-5


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_a_format_costs_no_more_than_its_resolution(ops: Ops, kv: str) -> None:
    batch = Batch("row", 2, 3, 64, kv=kv)
    found = append_and_attend(ops, batch)
    exact = Batch("row", 2, 3, 64).expected_attention()
    error = relative_error(found, exact)
    assert ERRORS[kv] / 50 < error <= ERRORS[kv] or (kv == "float32" and error <= ERRORS[kv])


def hard_numbers(head_dim: int) -> torch.Tensor:
    """(T, 2, D): every magnitude, zeros of both signs, blocks of one number, ties, outliers."""
    random = torch.Generator().manual_seed(1)
    lines = [torch.randn(2, head_dim, generator=random) * 10.0**p for p in range(-9, 10)]
    lines += [torch.zeros(2, head_dim), -torch.zeros(2, head_dim), torch.full((2, head_dim), -3.7)]
    lines.append(torch.arange(2 * head_dim).view(2, head_dim) / 2)
    lines.append(torch.randn(2, head_dim, generator=random).index_fill(1, torch.tensor([3]), 4e3))
    return torch.stack(lines)


@pytest.mark.parametrize("target", NATIVE)
@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("head_dim", [8, 33, 64, 80])
def test_native_lines_are_the_twins_to_the_bit(kv: str, head_dim: int, target: str) -> None:
    format, numbers = KV_FORMATS[kv], hard_numbers(head_dim)
    n_tokens, n_bytes = len(numbers), format.line_bytes(head_dim)
    table = table_of_one_row(format, head_dim, n_tokens)
    memory = torch.zeros(2 * n_tokens * 2 * n_bytes, dtype=torch.uint8)
    k, v = numbers, numbers.flip(0).contiguous()
    NativeOps(1, target).append(KVRegion(memory, 0), table, k, v)
    found = memory.view(2, 2, n_tokens, n_bytes)  # kv, head, position
    expected = write_lines(torch.stack((k, v)), format).transpose(1, 2)
    assert torch.equal(found, expected)


def table_of_one_row(format: KVFormat, head_dim: int, n_tokens: int):  # type: ignore[no-untyped-def]
    from sl_serve.kv.rows import RowTable

    line = format.line_bytes(head_dim)
    row = [0, n_tokens, 0, n_tokens, 0, 2 * n_tokens * line, n_tokens * line, line]
    return RowTable(np.array([row]), np.array([0]), format)


@every_block
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_lines_read_as_another_package_does(format: KVFormat, head_dim: int) -> None:
    lines = write_lines(hard_numbers(head_dim), format)
    kind = gguf.GGMLQuantizationType[format.blocks.upper()]
    expected = gguf.dequantize(lines.numpy(), kind)[..., :head_dim]
    np.testing.assert_array_equal(read_lines(lines, format, head_dim).numpy(), expected)


@every_block
def test_numbers_come_back_within_half_a_step(format: KVFormat) -> None:
    """A step is a 127th of the largest magnitude, or a 15th of the range; scales are halves."""
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(3))
    if format.name == "int8":
        step = x.abs().amax(dim=1) / 127
    else:
        step = (x.amax(dim=1) - x.amin(dim=1)) / 15
    error = (read_lines(write_lines(x, format), format, 32) - x).abs().amax(dim=1)
    assert (error <= 0.5 * step + 2**-10 * x.abs().amax(dim=1)).all()
    assert error.max() > 0.4 * step.min()


@every_block
def test_a_line_says_nothing_about_its_neighbours(format: KVFormat) -> None:
    x = hard_numbers(64)
    together = write_lines(x, format)
    for line, expected in zip(x, together, strict=True):
        assert torch.equal(write_lines(line, format), expected)


# Scores that are more than scaled products.

SLOPES = torch.tensor([0.5, 0.03, -0.1, 0.0, 1.0, 0.2])
SCORINGS = {
    "scale": Scoring(scale=0.3),
    "window": Scoring(window=33),
    "narrow window": Scoring(window=1),
    "wide window": Scoring(window=10_000),
    "softcap": Scoring(softcap=0.7),
    "slopes": Scoring(slopes=SLOPES),
    "everything": Scoring(scale=0.2, window=70, softcap=2.0, slopes=SLOPES),
}
every_scoring = pytest.mark.parametrize("scoring", SCORINGS.values(), ids=list(SCORINGS))


@every_scoring
@pytest.mark.parametrize(("head_dim", "kv"), [(40, "float32"), (64, "int8")])
def test_scores_are_those_of_the_definition(
    ops: Ops, scoring: Scoring, head_dim: int, kv: str
) -> None:
    batch = Batch("row", 2, 3, head_dim, scoring=scoring, kv=kv)
    assert relative_error(append_and_attend(ops, batch), batch.expected_attention()) <= 1e-5


@pytest.mark.parametrize("target", NATIVE)
def test_what_a_window_hides_is_not_even_read(target: str) -> None:
    batch = Batch("row", 2, 3, 64, scoring=Scoring(window=20))
    for work, past in zip(batch.works, batch.past, strict=True):
        n_hidden = max(0, work.start + 1 - 20)
        batch.poke(batch.memory, work, 0, torch.full_like(past[:n_hidden], torch.nan))
    found = append_and_attend(NativeOps(1, target), batch)
    assert relative_error(found, batch.expected_attention()) <= 1e-5


def test_the_definition_knows_its_options() -> None:
    """Each of them changes the result."""
    q, kv = np.random.default_rng(0).standard_normal((2, 80, 2, 6, 8))
    plain = causal(q[:, 0], kv)
    for scoring in SCORINGS.values():
        changed = np.abs(causal(q[:, 0], kv, scoring) - plain).max() > 0.01
        assert changed == (scoring.window != 10_000)
