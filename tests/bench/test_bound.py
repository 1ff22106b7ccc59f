from __future__ import annotations

from pathlib import Path

import pytest

from bench import bound
from bench.bound import Matrix, bound_s, case_rows, faster, measure_rates, model_matrices
from bench.cases import find_case
from bench.tiny import write_tiny_llama
from sl_serve.config import ModelConfig


def test_matrices_of_a_model() -> None:
    config = ModelConfig(
        family="llama",
        n_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_positions=8192,
    )
    assert model_matrices(config) == [
        Matrix("qkv", 576, 960, 30),
        Matrix("o", 576, 576, 30),
        Matrix("gate_up", 576, 3072, 30),
        Matrix("down", 1536, 576, 30),
        Matrix("head", 576, 49152, 1),
    ]


def test_rows_of_a_case() -> None:
    # 8 requests, 16 prompt and 8 output tokens: the last output token is not fed back
    assert case_rows(find_case("tiny-16x8-n8")) == (8 * 23, 64)


def test_bound_by_hand() -> None:
    matrices = [Matrix("qkv", 10, 20, 3), Matrix("head", 10, 100, 1)]
    rates = {"qkv": 1200.0, "head": 500.0}
    # 7 rows: 2 * 7 * 10 * 20 * 3 / 1200 = 7 s; 5 rows: 2 * 5 * 10 * 100 / 500 = 20 s
    assert bound_s(matrices, rates, layer_rows=7, head_rows=5) == pytest.approx(27.0)


def test_the_better_of_two_measurements_counts() -> None:
    assert faster({"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 3.0}) == {"a": 2.0, "b": 4.0}


def test_a_rate_is_the_best_of_all_ways_and_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 8.0, 2.0, 1.6] + [100.0] * 6)
    monkeypatch.setattr(bound, "_median_sweep_s", lambda sweep, x, repeats: next(seconds))
    rates = measure_rates([Matrix("m", 3, 5, 2)], row_counts=(10, 20))
    # flops: 2*10*3*5*2 = 600 at 10 rows and 1200 at 20; rates 150, 150, 300, 750
    assert rates == {"m": 750.0}


def test_all_ways_multiply_alike() -> None:
    import torch

    weight, x = torch.randn(5, 3), torch.randn(4, 3)
    for layout in [*bound._LAYOUTS, *bound._FLOAT32_LAYOUTS]:
        result = layout(weight, torch.empty(4, 5))(x)
        torch.testing.assert_close(result, x @ weight.T)


def test_the_median_leaves_out_the_first_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    clock = iter([0.0, 50.0, 50.0, 53.0, 53.0, 54.0, 54.0, 56.0])  # sweeps of 50, 3, 1 and 2 s
    monkeypatch.setattr(bound.time, "perf_counter", lambda: next(clock))
    assert bound._median_sweep_s([lambda x: x], torch.empty(1), repeats=3) == 2.0


def test_shapes_come_from_the_model_on_disk(tmp_path: Path) -> None:
    config = bound.read_model_config(write_tiny_llama(tmp_path))
    assert [(m.n_in, m.n_out) for m in model_matrices(config)] == [
        (64, 128),
        (64, 64),
        (64, 320),
        (160, 64),
        (64, 259),
    ]
