"""A plan and an examination, for people and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sl_serve.plan.budget import gib
from sl_serve.plan.doctor import Facts, Finding
from sl_serve.plan.hardware import Hardware
from sl_serve.plan.model_sizes import ModelSizes
from sl_serve.plan.placement import TIERS, Placement, Workload, tier_bytes
from sl_serve.plan.planner import Budgets, Plan
from sl_serve.plan.predict import StepTime
from sl_serve.plan.what_if import Help


def plan_dict(
    model: ModelSizes,
    hardware: Hardware,
    budgets: Budgets,
    workload: Workload,
    plan: Plan,
    helps: Sequence[Help],
    given: Sequence[str],
) -> dict[str, Any]:
    """JSON-ready; bytes, seconds, tokens. `given`: flags that were, for the engine to be told
    too."""
    return {
        "model": asdict(model),
        "hardware": asdict(hardware),
        "budgets_bytes": asdict(budgets),
        "workload": asdict(workload),
        "placement": asdict(plan.placement),
        "memory": [part._asdict() for part in plan.parts],
        "memory_bytes": tier_bytes(plan.parts),
        "prediction": asdict(plan.prediction),
        "would_help": [h._asdict() for h in helps],
        "serve_flags": serve_flags(plan.placement, given),
    }


def plan_view(
    model: ModelSizes,
    hardware: Hardware,
    budgets: Budgets,
    workload: Workload,
    plan: Plan,
    helps: Sequence[Help],
    given: Sequence[str],
) -> RenderableType:
    lines = [
        _choice(plan.placement, hardware),
        _speed(workload, plan),
        *_other_attention(plan),
        _step("a step of decoding", plan.prediction.decode),
        _step("a step of prefill", plan.prediction.prefill),
        "would help: " + (", ".join(map(_help, helps)) or "nothing that was tried"),
        " ".join(["sl-serve serve", shlex.quote(model.name), *serve_flags(plan.placement, given)]),
    ]
    title = f"{model.name} on {hardware.name}: what goes where"
    return Group(_memory_table(title, budgets, plan), *(Text(line) for line in lines))


def serve_flags(placement: Placement, given: Sequence[str]) -> list[str]:
    """For the engine to cut its steps so, on the same terms."""
    return [
        f"--max-rows {placement.total_rows}",
        f"--sub-batches {placement.n_sub_batches}",
        f"--prefill-tokens {placement.prefill_tokens}",
        *(["--attention host"] if placement.attention == "host" else []),
        *given,
    ]


def doctor_view(facts: Facts, findings: Sequence[Finding]) -> RenderableType:
    table = Table(title="this machine", title_justify="left", show_header=False)
    for what, value in _known(facts):
        table.add_row(what, value)
    if not findings:
        return Group(table, Text("nothing wrong was found", style="green"))
    lines = []
    for finding in findings:
        lines.append(Text(f"{finding.name}: {finding.what}", style="bold"))
        lines.append(Text(f"    {finding.advice}"))
    return Group(table, *lines)


def _memory_table(title: str, budgets: Budgets, plan: Plan) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("tier")
    table.add_column("part")
    table.add_column("memory", justify="right")
    sums = tier_bytes(plan.parts)
    for tier in (t for t in TIERS if sums[t]):
        for part in plan.parts:
            if part.tier == tier:
                table.add_row(tier, part.what, gib(part.n_bytes))
        table.add_row(tier, f"together, of {gib(budgets.get(tier))}", gib(sums[tier]))
        table.add_section()
    return table


def _choice(placement: Placement, hardware: Hardware) -> str:
    layers = [
        f"{n} on {'the ' * (tier != 'disk')}{tier}"
        for tier, n in zip(
            TIERS,
            (placement.n_device_layers, placement.n_host_layers, placement.n_disk_layers),
            strict=True,
        )
        if n
    ]
    parts = [
        f"layers: {', '.join(layers)}",
        f"{placement.n_sub_batches} sub-batches of {placement.rows} rows",
        f"{placement.prefill_tokens} prompt tokens a step",
    ]
    if hardware.has_device:
        parts.append(f"KV of {placement.kv_device_share:.0%} of the rows on the device")
        if placement.kv_device_share < 1:
            where = "the processor" if placement.attention == "host" else "the device"
            parts.append(f"the others' attended to by {where}")
    if placement.swaps_hidden:
        parts.append("hidden states swapped")
    return "; ".join(parts)


def _speed(workload: Workload, plan: Plan) -> str:
    found = plan.prediction
    return (
        f"{found.tokens_per_s:.3g} tokens/s over {workload.n_requests} requests of "
        f"{workload.prompt_tokens} + {workload.output_tokens} tokens ({found.wall_s:.3g} s); "
        f"decode {found.decode_tokens_per_s:.3g}, prefill {found.prefill_tokens_per_s:.3g} "
        f"tokens/s; {found.binds} binds"
    )


def _other_attention(plan: Plan) -> list[str]:
    """Why attention is where it is."""
    other, is_host = plan.other_attention, plan.placement.attention == "host"
    if other is None:
        return []
    return [
        f"attended to by {'the device' if is_host else 'the processor'} instead: at best "
        f"{other.tokens_per_s:.3g} tokens/s; {other.binds} binds"
    ]


def _step(what: str, time: StepTime) -> str:
    busiest = sorted(time.resource_s.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in busiest if seconds > 0)
    return f"{what}: {time.step_s:.3g} s ({parts})"


def _help(help_: Help) -> str:
    return f"{help_.what} ({help_.times_faster:.2f} x)"


def _known(facts: Facts) -> list[tuple[str, str]]:
    rows = [
        ("memory", f"{gib(facts.available_bytes)} free of {gib(facts.total_bytes)}"),
        ("host memory reads", f"{facts.host_read_bytes_per_s / 1e9:.1f} GB/s"),
        ("cores", f"{facts.n_cores} of {facts.n_machine_cores}, {facts.n_threads} threads"),
        ("native core", facts.native_target or "not built"),
        ("huge pages", facts.huge_pages or "unknown"),
        ("accelerator", facts.device_name or "none"),
    ]
    if facts.link_bytes_per_s is not None:
        rows.append(("link, to the accelerator", f"{facts.link_bytes_per_s / 1e9:.1f} GB/s"))
    if facts.disk_read_bytes_per_s is not None:
        rows.append((f"disk at {facts.disk_dir}", f"{facts.disk_read_bytes_per_s / 1e9:.1f} GB/s"))
    return rows
