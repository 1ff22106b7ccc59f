"""One job in this process: a full run of a system, a probe of a peer, or the bound."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.peers import load_peer
from bench.runner import OURS


def run_job(case: Case, system: str, model: Path) -> dict[str, Any]:
    """`system` is "sl-serve", "bound", "PEER:probe" or "PEER:VARIANT"; the answer is JSON-ready."""
    if system == "bound":
        from bench.bound import measure_case_rates

        return {"rates": measure_case_rates(case, model)}
    if system == OURS:
        from bench import ours

        return asdict(ours.measure(case, model))
    name, _, variant = system.partition(":")
    peer = load_peer(name)
    if variant == "probe":
        return asdict(peer.probe(case, model))
    return asdict(peer.measure(case, model, variant))
