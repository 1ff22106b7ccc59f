"""What would help most: the same plan on faster hardware, a new plan in more memory."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from sl_serve.plan.hardware import Hardware
from sl_serve.plan.model_sizes import ModelSizes
from sl_serve.plan.placement import Workload
from sl_serve.plan.planner import ENGINE, Abilities, Budgets, Plan, choose
from sl_serve.plan.predict import predict

WORTH_SAYING = 1.02  # times faster


class Help(NamedTuple):
    what: str  # "twice the link"
    times_faster: float


def what_helps(
    model: ModelSizes,
    hardware: Hardware,
    budgets: Budgets,
    workload: Workload,
    plan: Plan,
    abilities: Abilities = ENGINE,
) -> list[Help]:
    """Best first, what changes nothing left out."""
    now = plan.prediction.tokens_per_s
    helps = [
        Help(what, predict(plan.model, plan.placement, better, workload).tokens_per_s / now)
        for what, better in _faster(hardware)
    ]
    for what, larger in _larger(hardware, budgets):
        found = choose(model, hardware, larger, workload, abilities)
        helps.append(Help(what, found.prediction.tokens_per_s / now))
    worth = [h for h in helps if h.times_faster >= WORTH_SAYING]
    return sorted(worth, key=lambda h: -h.times_faster)


def _faster(now: Hardware) -> list[tuple[str, Hardware]]:
    link = replace(
        now,
        link_down_bytes_per_s=2 * now.link_down_bytes_per_s,
        link_up_bytes_per_s=2 * now.link_up_bytes_per_s,
        link_down_both_bytes_per_s=2 * now.link_down_both_bytes_per_s,
        link_up_both_bytes_per_s=2 * now.link_up_both_bytes_per_s,
    )
    disk = replace(now, disk_read_bytes_per_s=2 * now.disk_read_bytes_per_s)
    attention = now.host_attention
    host = replace(
        now,
        host_read_bytes_per_s=2 * now.host_read_bytes_per_s,
        host_attention=attention._replace(prefix_bytes_per_s=2 * attention.prefix_bytes_per_s),
    )
    return [
        ("twice the link", link),
        ("twice the disk's rate", disk),
        ("twice the host memory's rate", host),
        ("twice the arithmetic", replace(now, matmul=now.matmul.faster(2))),
    ]


def _larger(hardware: Hardware, budgets: Budgets) -> list[tuple[str, Budgets]]:
    larger = [("twice the host memory", replace(budgets, host=2 * budgets.host))]
    if hardware.has_device:
        larger.append(("twice the device memory", replace(budgets, device=2 * budgets.device)))
    return larger
