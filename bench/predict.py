"""What the planner predicts, beside what is measured or was published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from bench.cases import Case
from bench.measurement import Measurement
from bench.runner import OURS, PLACEMENT, Job, Say
from sl_serve.plan.hardware import Hardware
from sl_serve.plan.model_reader import read_sizes, stored_dtype, stored_formats, torch_dtype
from sl_serve.plan.placement import Placement, Workload
from sl_serve.plan.planner import Budgets, Plan, choose
from sl_serve.plan.predict import Prediction, predict
from sl_serve.plan.probe import probe
from sl_serve.plan.probe_compute import Shapes
from sl_serve.plan.profiles import PROFILES
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.dummy import open_dummy
from sl_serve.weights.requantised import with_weights


class Published(NamedTuple):
    """FlexGen's tokens/s and effective batch on one T4: Sheng et al., "FlexGen: High-Throughput
    Generative Inference of Large Language Models with a Single GPU" (ICML 2023, arXiv 2303.06865),
    table 2, prompts of 512 and outputs of 32 tokens, fp16 weights."""

    shape: str
    batch: int
    tokens_per_s: float


FLEXGEN = (
    Published("opt-6.7b", 2, 25.3),
    Published("opt-30b", 144, 7.32),
    Published("opt-175b", 256, 0.69),
)
FLEXGEN_TOKENS = 512, 32
MANY_BATCHES = 8  # a longer job: rows are recycled, prefill and decode mix


def predict_case(case: Case, model: Path, job: Job, say: Say) -> dict[str, Any]:
    """Probe, predict the engine's own plan, then run; JSON-ready."""
    checkpoint = with_weights(open_checkpoint(model), case.engine.weights)
    try:
        stored, settings = torch_dtype(stored_dtype(checkpoint)), checkpoint.config
        formats = stored_formats(checkpoint)
    finally:
        checkpoint.close()
    placement = Placement(**job(PLACEMENT))
    hardware = probe(
        Shapes(settings, stored, case.engine.dtype, formats),
        model if placement.n_disk_layers else None,
        case.engine.n_threads or torch.get_num_threads(),
        lambda what: say(f"measuring {what}"),
    )
    sizes = read_sizes(case.model, settings, stored, torch_dtype(case.engine.dtype), formats)
    workload = Workload(case.prompt_tokens, case.output_tokens, case.n_requests)
    predicted = predict(sizes, placement, hardware, workload)
    say(f"running {case.name}")
    measured = Measurement(**job(OURS))
    return comparison(case, hardware, predicted, measured)


def comparison(
    case: Case, hardware: Hardware, predicted: Prediction, measured: Measurement
) -> dict[str, Any]:
    tokens_per_s = measured.generated_tokens / measured.wall_s
    return {
        "case": case.name,
        "hardware": asdict(hardware),
        "prediction": asdict(predicted),
        "predicted_tokens_per_s": predicted.tokens_per_s,
        "measured_tokens_per_s": tokens_per_s,
        "measured_over_predicted": tokens_per_s / predicted.tokens_per_s,
        "binds": predicted.binds,
        "extras": measured.extras,
    }


def cases_table(reports: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="generated tokens/s", title_justify="left")
    for title in ("case", "binds", "predicted", "measured", "measured / predicted"):
        table.add_column(title, justify="left" if title in ("case", "binds") else "right")
    for report in reports:
        table.add_row(
            report["case"],
            report["binds"],
            f"{report['predicted_tokens_per_s']:.4g}",
            f"{report['measured_tokens_per_s']:.4g}",
            f"{report['measured_over_predicted']:.2f}",
        )
    return table


def predict_flexgen() -> list[dict[str, Any]]:
    """The planner on FlexGen's machine, for its batch and for a longer job; JSON-ready."""
    return [_flexgen_row(published) for published in FLEXGEN]


def _flexgen_row(published: Published) -> dict[str, Any]:
    hardware = PROFILES["t4-flexgen"]
    settings = open_dummy(published.shape).config
    sizes = read_sizes(published.shape, settings, torch.float16, torch.float16)

    def plan(n_requests: int) -> Plan:
        return choose(sizes, hardware, Budgets.of(hardware), Workload(*FLEXGEN_TOKENS, n_requests))

    one, many = plan(published.batch), plan(MANY_BATCHES * published.batch)
    return {
        "model": published.shape,
        "published_tokens_per_s": published.tokens_per_s,
        "batch": published.batch,
        "one_batch": _plan_dict(one),
        "many_batches": _plan_dict(many),
        "times_published": one.prediction.tokens_per_s / published.tokens_per_s,
    }


def _plan_dict(plan: Plan) -> dict[str, Any]:
    return {"placement": asdict(plan.placement), "prediction": asdict(plan.prediction)}


def flexgen_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="FlexGen's T4 (16 GB, 208 GB DRAM, SSD at 2 GB/s), prompt 512, output 32, tokens/s",
        title_justify="left",
        caption="published: arXiv 2303.06865, table 2; ours: predicted, not measured",
        caption_justify="left",
    )
    for title in ("model", "FlexGen", "batch", "ours", "ratio", "binds", "ours, 8 batches", "rows"):
        table.add_column(title, justify="left" if title in ("model", "binds") else "right")
    for row in rows:
        one, many = row["one_batch"], row["many_batches"]
        table.add_row(
            row["model"],
            f"{row['published_tokens_per_s']:.3g}",
            str(row["batch"]),
            f"{one['prediction']['tokens_per_s']:.3g}",
            f"{row['times_published']:.2f}",
            one["prediction"]["binds"],
            f"{many['prediction']['tokens_per_s']:.3g}",
            str(many["placement"]["rows"] * many["placement"]["n_sub_batches"]),
        )
    return table
