"""One job in this process: a full run of a system, a probe of a peer, or the bound."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.peers import load_peer
from bench.runner import OURS, PLACEMENT
from sl_serve.plan.placement import Placement


def run_job(case: Case, system: str, model: Path) -> dict[str, Any]:
    """`system` is "sl-serve", PLACEMENT, "bound", "PEER:probe" or "PEER:VARIANT"; the answer is
    JSON-ready."""
    if system == PLACEMENT:
        return asdict(_placement(case, model))
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


def _placement(case: Case, model: Path) -> Placement:
    """As the engine will run the case, from the memory that a process of its own finds."""
    from sl_serve.plan.placement import Workload, placement_of
    from sl_serve.stored_model import plan_checkpoint
    from sl_serve.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    try:
        plan = plan_checkpoint(checkpoint, case.engine)
    finally:
        checkpoint.close()
    return placement_of(plan, Workload(case.prompt_tokens, case.output_tokens, case.n_requests))
