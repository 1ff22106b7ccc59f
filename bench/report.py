"""From measurements to the figures that are published, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.bound import Matrix, bound_s, case_rows, faster
from bench.measurement import Measurement
from bench.runner import OURS, Results

REFERENCE_DTYPE = "float32"


def build_report(results: Results, matrices: Sequence[Matrix]) -> dict[str, Any]:
    """JSON-ready. Ratios are of medians over the repeats; `ratio_to_best_peer` is None without
    a measured peer."""
    case = results.case
    rates = faster(*results.bound_rates)
    bound = case.generated_tokens / bound_s(matrices, rates, *case_rows(case))
    systems = [_system(name, runs) for name, runs in results.runs.items()]
    speeds = {system["name"]: system["tokens_per_s"] for system in systems}
    best_peer = max((s for name, s in speeds.items() if name != OURS), default=None)
    return {
        "case": case.name,
        "config": asdict(case),
        "systems": systems,
        "without_figures": results.missing,
        "probes": {peer: asdict(probe) for peer, probe in results.probes.items()},
        "matmul_flop_per_s": rates,
        "bound_tokens_per_s": bound,
        "share_of_bound": speeds[OURS] / bound,
        "ratio_to_best_peer": speeds[OURS] / best_peer if best_peer else None,
        "agreement": _agreements(results),
    }


def _system(name: str, runs: Sequence[Measurement]) -> dict[str, Any]:
    wall_s = statistics.median(run.wall_s for run in runs)
    return {
        "name": name,
        "tokens_per_s": runs[0].generated_tokens / wall_s,
        "wall_s": wall_s,
        "wall_s_of_runs": [run.wall_s for run in runs],
        "load_s": statistics.median(run.load_s for run in runs),
        "peak_rss_bytes": max(run.peak_rss_bytes for run in runs),
        "generated_tokens": runs[0].generated_tokens,
        "extras": runs[-1].extras,
    }


def _agreements(results: Results) -> dict[str, dict[str, Any]]:
    """Our tokens against those of each peer that computes in float32."""
    ours = results.runs[OURS][0].output_ids
    return {
        name: agreement(ours, runs[0].output_ids)
        for name, runs in results.runs.items()
        if REFERENCE_DTYPE in name.split(":")
    }


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Share of equal tokens by position, and how many requests are equal throughout.

    One near-tie decided otherwise changes the rest of a request, so the share may be well below
    one where all arithmetic is right.
    """
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "equal_tokens_share": sum(a == b for a, b in pairs) / len(pairs),
        "equal_requests": sum(list(x) == list(y) for x, y in zip(ours, theirs, strict=True)),
        "requests": len(ours),
    }


def render(report: dict[str, Any]) -> RenderableType:
    """The table of systems, and a line for each comparison."""
    table = Table(title=report["case"], title_justify="left")
    table.add_column("system")
    for title in ("tokens/s", "wall s", "load s", "peak MiB"):
        table.add_column(title, justify="right")
    for system in report["systems"]:
        table.add_row(
            system["name"],
            f"{system['tokens_per_s']:.1f}",
            f"{system['wall_s']:.1f}",
            f"{system['load_s']:.1f}",
            f"{system['peak_rss_bytes'] / 2**20:.0f}",
        )
    for name, reason in report["without_figures"].items():
        table.add_row(name, Text(reason))
    return Group(table, *map(Text, _lines(report)))


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"compute bound {report['bound_tokens_per_s']:.1f} tokens/s; "
        f"sl-serve reaches {report['share_of_bound']:.1%} of it"
    ]
    if report["ratio_to_best_peer"] is not None:
        lines.append(f"{report['ratio_to_best_peer']:.2f} times the best peer")
    for name, figures in report["agreement"].items():
        lines.append(
            f"same tokens as {name}: {figures['equal_tokens_share']:.2%}, "
            f"{figures['equal_requests']} of {figures['requests']} requests throughout"
        )
    for peer, probe in report["probes"].items():
        tried = ", ".join(f"{v} {speed:.0f}" for v, speed in probe["estimates"].items())
        lines.append(f"{peer} tried (estimated tokens/s): {tried}")
        lines += [f"{peer} {dtype} skipped {why}" for dtype, why in probe["skipped"].items()]
    return lines
