"""What a run from disk is held against, and its table.

    disk_s    = bytes that the step needs from disk / the disk's rate around this run
    compute_s = its matrix products at the best rate found (bench.bound)

A step cannot be shorter than either; where reading and computing overlap fully it is as long as
the longer of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.bound import Matrix, Rates, bound_s, faster
from bench.disk import PEER, DiskResults, DiskRun
from bench.disk_cases import FEW_REQUESTS, MANY_REQUESTS, DiskStep
from bench.measurement import Measurement
from bench.report import agreement
from bench.runner import OURS

TABLE_WIDTH = 140  # columns; also where the output is no terminal

# figure -> (what it is to be, whether more is better)
TARGETS = {
    f"{OURS} / {PEER} bfloat16": (2.5, True),
    f"{OURS} / {PEER} float32": (1.15, True),
    **{f"decode step / disk, {n} requests": (1.2, False) for n in FEW_REQUESTS},
    f"step / max(disk, compute), {MANY_REQUESTS} requests": (1.2, False),
    "peak memory / --host-memory": (1.15, False),
}


def build_report(
    results: DiskResults, matrices: Sequence[Matrix], host_memory_bytes: int
) -> dict[str, Any]:
    """JSON-ready. Figures are medians over the repeats, peak memory is the highest."""
    rates = faster(*results.rates)
    runs = [_run_dict(run, matrices, rates) for run in results.runs]
    figures = _figures(runs, host_memory_bytes)
    return {
        "runs": runs,
        "without_figures": results.missing,
        "times_own_weights": _times_own_weights(runs),
        "matmul_flop_per_s": rates,
        "figures": [
            {
                "figure": name,
                "value": value,
                "target": target,
                "met": value >= target if more else value <= target,
            }
            for name, (target, more) in TARGETS.items()
            if (value := figures.get(name)) is not None
        ],
        "agreement": _agreement(results),
    }


def _run_dict(run: DiskRun, matrices: Sequence[Matrix], rates: Rates) -> dict[str, Any]:
    measured = run.measurement
    steps = [DiskStep(**step) for step in measured.extras["steps"]]
    disk_s = measured.extras["disk_bytes"] / run.disk_bytes_per_s
    kinds = {
        "prefill": [s for s in steps if s.n_prefill_tokens],
        "decode": [s for s in steps if not s.n_prefill_tokens],
        "all": steps,
    }
    return {
        "system": run.system,
        "n_requests": run.n_requests,
        "tokens_per_s": measured.generated_tokens / measured.wall_s,
        "wall_s": measured.wall_s,
        "load_s": measured.load_s,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "disk_bytes_per_s": run.disk_bytes_per_s,
        "disk_before": asdict(run.before),
        "disk_after": asdict(run.after),
        "steps": {k: _means(s, disk_s, matrices, rates) for k, s in kinds.items()},
        "extras": measured.extras,
    }


def _times_own_weights(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens/s with other weights over those with the model's own, medians of each."""
    speeds: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        speeds.setdefault((run["system"], run["n_requests"]), []).append(run["tokens_per_s"])
    return [
        {
            "weights": system.partition(":")[2],
            "n_requests": n,
            "times": statistics.median(found) / statistics.median(speeds[OURS, n]),
        }
        for (system, n), found in speeds.items()
        if system.startswith(f"{OURS}:")
    ]


def _means(
    steps: Sequence[DiskStep], disk_s: float, matrices: Sequence[Matrix], rates: Rates
) -> dict[str, float | None]:
    """Per step; None beside a disk that nothing is read from. The head of a prefill step counts as
    free: how many of its rows end their prompt is not recorded, and they are few beside the
    tokens."""
    n = len(steps)
    wall_s = sum(s.wall_s for s in steps)
    compute_s = [
        bound_s(matrices, rates, s.n_prefill_tokens + s.n_decode_tokens, s.n_decode_tokens)
        for s in steps
    ]
    return {
        "n_steps": n,
        "wall_s": wall_s / n,
        "read_bytes": sum(s.read_bytes for s in steps) / n,
        "disk_s": disk_s,
        "compute_s": sum(compute_s) / n,
        "wall_over_disk": wall_s / (n * disk_s) if disk_s else None,
        "wall_over_bound": wall_s / sum(max(disk_s, c) for c in compute_s),
    }


def _figures(runs: Sequence[dict[str, Any]], host_memory_bytes: int) -> dict[str, float]:
    """Of `TARGETS`, those that this session has."""
    ours = [run for run in runs if run["system"] == OURS]
    few = {n: [r for r in ours if r["n_requests"] == n] for n in FEW_REQUESTS}
    many = [r for r in ours if r["n_requests"] == MANY_REQUESTS]
    speed = statistics.median(r["tokens_per_s"] for r in many)
    peers: dict[str, list[float]] = {}
    for run in runs:
        if run["system"].partition(":")[0] != OURS:
            peers.setdefault(run["system"].replace(":", " "), []).append(run["tokens_per_s"])
    return {
        **{f"{OURS} / {name}": speed / statistics.median(v) for name, v in peers.items()},
        **{
            f"decode step / disk, {n} requests": _median(of_n, "decode", "wall_over_disk")
            for n, of_n in few.items()
        },
        f"step / max(disk, compute), {MANY_REQUESTS} requests": _median(
            many, "all", "wall_over_bound"
        ),
        "peak memory / --host-memory": max(r["peak_rss_bytes"] for r in ours) / host_memory_bytes,
    }


def _median(runs: Sequence[dict[str, Any]], kind: str, figure: str) -> float:
    return statistics.median(float(run["steps"][kind][figure]) for run in runs)


def _agreement(results: DiskResults) -> dict[str, Any] | None:
    """Our tokens against the peer's in float32, which is what we compute in."""
    ours = _first(results, OURS)
    theirs = _first(results, f"{PEER}:float32")
    return agreement(ours.output_ids, theirs.output_ids) if ours and theirs else None


def _first(results: DiskResults, system: str) -> Measurement | None:
    found = (
        r.measurement for r in results.runs if r.system == system and r.n_requests == MANY_REQUESTS
    )
    return next(found, None)


def render(report: dict[str, Any]) -> RenderableType:
    """The table of runs, and a line for each target."""
    table = Table(title=f"{report['model']} from disk", title_justify="left")
    table.add_column("system")
    for title in (
        "requests",
        "tokens/s",
        "prefill s",
        "decode s",
        "read GB",
        "disk GB/s",
        "step/disk",
        "step/bound",
        "x own",
        "peak MB",
    ):
        table.add_column(title, justify="right")
    times = {(t["weights"], t["n_requests"]): t["times"] for t in report["times_own_weights"]}
    for run in report["runs"]:
        steps = run["steps"]
        over_disk = steps["decode"]["wall_over_disk"]
        own = times.get((run["system"].partition(":")[2], run["n_requests"]))
        rates = [max(run[when].values()) / 1e9 for when in ("disk_before", "disk_after")]
        table.add_row(
            run["system"],
            str(run["n_requests"]),
            f"{run['tokens_per_s']:.2f}",
            f"{steps['prefill']['n_steps']} x {steps['prefill']['wall_s']:.2f}",
            f"{steps['decode']['n_steps']} x {steps['decode']['wall_s']:.2f}",
            f"{steps['decode']['read_bytes'] / 1e9:.2f}",
            f"{rates[0]:.2f}, {rates[1]:.2f}",
            "" if over_disk is None else f"{over_disk:.2f}",
            f"{steps['all']['wall_over_bound']:.2f}",
            "" if own is None else f"{own:.2f}",
            f"{run['peak_rss_bytes'] / 1e6:.0f}",
        )
    for name, reason in report["without_figures"].items():
        table.add_row(name, Text(reason))
    return Group(table, *map(Text, _lines(report)))


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"--weights {t['weights']}, {t['n_requests']} requests: {t['times']:.2f} times the model's "
        "own"
        for t in report["times_own_weights"]
    ]
    lines += [
        f"{f['figure']}: {f['value']:.2f}, target {f['target']}{'' if f['met'] else ' MISSED'}"
        for f in report["figures"]
    ]
    if report["agreement"] is not None:
        same = report["agreement"]
        lines.append(
            f"same tokens as {PEER} float32: {same['equal_tokens_share']:.2%}, "
            f"{same['equal_requests']} of {same['requests']} requests throughout"
        )
    return lines
