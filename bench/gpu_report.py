"""Speeds beside the bound that the measured link and arithmetic set.

With the memory cap D, W bytes of layers, P parameters in matrices, and the link's rate B down:

    bound_s = max(output_tokens * max(0, W - D) / B, 2 * P * tokens / F)

which no scheme beats that crosses the link with the layers that do not fit, once per generated
token: KV, activations and everything else count as free, and D as filled with layers. `link_share`
is the time that sl-serve's own bytes down would take at B, of the time its steps took: how busy
it keeps the link.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.bound import case_rows
from bench.gpu_cases import GIB, ITEMSIZE, GpuCase
from bench.runner import OURS
from sl_serve.models import load_family


@dataclass(slots=True)
class GpuResults:
    """`link`: as bench.gpu_work.measure_link gives it; `runs`: by system; `missing`: why not."""

    case: GpuCase
    link: dict[str, Any]
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def bound_s(case: GpuCase, link: dict[str, Any]) -> float:
    """Seconds for the whole case, by the formula above."""
    model = case.model
    params = load_family(model.family).layer_params(model)
    in_layers = model.n_layers * sum(math.prod(p.shape) for p in params if p.is_matrix)
    streamed_bytes = max(0, in_layers * ITEMSIZE - case.device_gib * GIB)
    link_s = case.output_tokens * streamed_bytes / link["down_bytes_per_s"]
    layer_rows, head_rows = case_rows(case.workload())
    in_head = model.hidden_size * model.vocab_size
    compute_s = 2 * (layer_rows * in_layers + head_rows * in_head) / link["flops_per_s"]
    return float(max(link_s, compute_s))


def build_report(results: GpuResults) -> dict[str, Any]:
    """JSON-ready. `ratio_to_best_peer` is None where no peer ran."""
    case, runs = results.case, results.runs
    bound = case.workload().generated_tokens / bound_s(case, results.link)
    ours = runs.get(OURS)
    peers = [run["tokens_per_s"] for name, run in runs.items() if name != OURS]
    report: dict[str, Any] = {
        "case": case.name,
        "bound_tokens_per_s": bound,
        "share_of_bound": ours and ours["tokens_per_s"] / bound,
        "link_share": ours and _link_share(ours, results.link),
        "ratio_to_best_peer": ours["tokens_per_s"] / max(peers) if ours and peers else None,
        "systems": runs,
        "without_figures": results.missing,
    }
    return report


def _link_share(ours: dict[str, Any], link: dict[str, Any]) -> float:
    down_bytes: int = ours["weight_bytes"] + ours["kv_down_bytes"]
    return down_bytes / float(link["down_bytes_per_s"]) / float(ours["step_s"])


def render(link: dict[str, Any], reports: Sequence[dict[str, Any]]) -> Group:
    rates = ", ".join(
        f"{what} {link[key] / 1e9:.1f} GB/s"
        for what, key in (
            ("down", "down_bytes_per_s"),
            ("up", "up_bytes_per_s"),
            ("each way at once", "each_way_at_once_bytes_per_s"),
        )
    )
    about = f"{link['gpu']}: {rates}, {link['flops_per_s'] / 1e12:.0f} TFLOP/s"
    table = Table("case", "system", "tokens/s", "wall, s", "of the bound", "of the link")
    for report in reports:
        for name, run in report["systems"].items():
            shares = (report["share_of_bound"], report["link_share"]) if name == OURS else ()
            table.add_row(
                report["case"],
                name,
                f"{run['tokens_per_s']:.1f}",
                f"{run['wall_s']:.1f}",
                *(f"{share:.0%}" for share in shares),
            )
        for name, reason in report["without_figures"].items():
            table.add_row(report["case"], name, Text(reason))
        table.add_section()
    return Group(Text(about), table)
