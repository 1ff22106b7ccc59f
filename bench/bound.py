"""The compute bound: what the machine's matrix multiplications alone would allow.

A case needs, per request, `prompt_tokens + output_tokens - 1` rows through every layer (the last
generated token is never fed back) and `output_tokens` rows through the head (prefill needs the
logits of its last token only). With F(m) the rate measured for matrix m, in FLOP/s,

    bound_s            = sum over layer matrices of 2 * layer_rows * n_in * n_out * n_layers / F(m)
                       + 2 * head_rows * hidden * vocab / F(head)
    bound_tokens_per_s = generated tokens / bound_s

F(m) is the best over ways to multiply and numbers of rows, each the median of several sweeps
through as many distinct weights as the model has layers, so that caches help no more than they
do in the model. Attention, norms and sampling are counted as free. A rate that is measured too
low would flatter the share of the bound: hence the best of everything, and `faster`, which joins
the measurements made before and after the systems ran.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases import Case
from sl_serve.config import ModelConfig
from sl_serve.ops import choose_ops

Rates = Mapping[str, float]  # matrix name -> FLOP/s
_Multiply = Callable[[torch.Tensor], object]


@dataclass(frozen=True, slots=True)
class Matrix:
    name: str
    n_in: int
    n_out: int
    count: int  # how many of this shape a pass through the model meets

    def flops(self, rows: int) -> int:
        return 2 * rows * self.n_in * self.n_out * self.count


def model_matrices(config: ModelConfig) -> list[Matrix]:
    """The matrices of a dense decoder, those with the same input joined."""
    hidden, layers = config.hidden_size, config.n_layers
    return [
        Matrix("qkv", hidden, config.q_size + 2 * config.kv_size, layers),
        Matrix("o", config.q_size, hidden, layers),
        Matrix("gate_up", hidden, 2 * config.intermediate_size, layers),
        Matrix("down", config.intermediate_size, hidden, layers),
        Matrix("head", hidden, config.vocab_size, 1),
    ]


def read_model_config(model: Path) -> ModelConfig:
    from sl_serve.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    try:
        return checkpoint.config
    finally:
        checkpoint.close()


def case_rows(case: Case) -> tuple[int, int]:
    """Rows through the layers and through the head, over the whole case."""
    layer_rows = case.n_requests * (case.prompt_tokens + case.output_tokens - 1)
    return layer_rows, case.generated_tokens


def bound_s(matrices: Sequence[Matrix], rates: Rates, layer_rows: int, head_rows: int) -> float:
    """Seconds of multiplication, by the formula above."""
    rows = {m.name: head_rows if m.name == "head" else layer_rows for m in matrices}
    return sum(m.flops(rows[m.name]) / rates[m.name] for m in matrices)


def faster(first: Rates, second: Rates) -> dict[str, float]:
    """The better rate of each matrix."""
    return {name: max(first[name], second[name]) for name in first}


def measure_case_rates(case: Case, model: Path) -> dict[str, float]:
    """Rates at the rows of a decode step, and at those of a prefill chunk."""
    torch.manual_seed(0)
    matrices = model_matrices(read_model_config(model))
    return measure_rates(matrices, (case.n_requests, 1024), dtype=case.engine.dtype)


def measure_rates(
    matrices: Sequence[Matrix], row_counts: Sequence[int], dtype: str = "float32", repeats: int = 5
) -> dict[str, float]:
    """The best rate found for each matrix, over `row_counts` and all ways to multiply."""
    kind = getattr(torch, dtype)
    with torch.inference_mode():
        return {m.name: _best_rate(m, row_counts, kind, repeats) for m in matrices}


def _best_rate(
    matrix: Matrix, row_counts: Sequence[int], dtype: torch.dtype, repeats: int
) -> float:
    weights = [torch.randn(matrix.n_out, matrix.n_in, dtype=dtype) for _ in range(matrix.count)]
    best = 0.0
    layouts = [*_LAYOUTS, *(_FLOAT32_LAYOUTS if dtype == torch.float32 else ())]
    for layout in layouts:
        for rows in row_counts:
            x = torch.randn(rows, matrix.n_in, dtype=dtype)
            out = torch.empty(rows, matrix.n_out, dtype=dtype)
            sweep = [layout(w, out) for w in weights]
            seconds = _median_sweep_s(sweep, x, repeats)
            best = max(best, matrix.flops(rows) / seconds)
    return best


def _median_sweep_s(sweep: Sequence[_Multiply], x: torch.Tensor, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for multiply in sweep:
            multiply(x)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one warms up


def _in_out(weight: torch.Tensor, out: torch.Tensor) -> _Multiply:
    transposed = weight.t().contiguous()
    return lambda x: torch.mm(x, transposed, out=out)


def _out_in(weight: torch.Tensor, out: torch.Tensor) -> _Multiply:
    """What F.linear does, without its allocation."""
    return lambda x: torch.mm(x, weight.t(), out=out)


def _native(weight: torch.Tensor, out: torch.Tensor) -> _Multiply:
    """Our own kernel, so that the bound never lies below what it can do."""
    ops = choose_ops("float32", torch.get_num_threads())

    def multiply(x: torch.Tensor) -> torch.Tensor:
        ops.logits(x, weight, out)
        return out

    return multiply


def _packed(weight: torch.Tensor, out: torch.Tensor) -> _Multiply:
    """oneDNN's own weight layout, chosen for this number of rows."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(out))
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


_FLOAT32_LAYOUTS = (_native,)
_LAYOUTS = [_in_out, _out_in]
if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
    _LAYOUTS.append(_packed)
