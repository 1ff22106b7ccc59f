"""What the planner predicts, beside what is measured or was published."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from bench.bound import read_model_config
from bench.cases import Case
from bench.measurement import Measurement
from bench.runner import OURS, Job, Say
from sl_serve.plan.hardware import Hardware
from sl_serve.plan.model_reader import read_sizes, stored_dtype, torch_dtype
from sl_serve.plan.model_sizes import ModelSizes
from sl_serve.plan.placement import Placement, Workload
from sl_serve.plan.planner import Budgets, Plan, choose
from sl_serve.plan.predict import Prediction, predict
from sl_serve.plan.probe import Shapes, probe
from sl_serve.plan.profiles import PROFILES
from sl_serve.plan.step_memory import DEFAULT_PREFILL_TOKENS
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.dummy import open_dummy


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
    """Probe, predict the engine's own settings, then run; JSON-ready."""
    shapes = _shapes(case, model)
    n_threads = case.engine.n_threads or torch.get_num_threads()
    hardware = probe(shapes, None, n_threads, lambda what: say(f"measuring {what}"))
    sizes = read_sizes(case.model, shapes.model, shapes.stored, torch_dtype(shapes.compute))
    predicted = predict(sizes, case_placement(case, sizes), hardware, case_workload(case))
    say("running it")
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


def case_workload(case: Case) -> Workload:
    return Workload(case.prompt_tokens, case.output_tokens, case.n_requests)


def case_placement(case: Case, model: ModelSizes) -> Placement:
    """How the engine cuts this case's steps on the processor, everything in memory."""
    scheduler = case.engine.scheduler
    return Placement(
        n_device_layers=0,
        n_host_layers=model.n_layers,
        n_disk_layers=0,
        rows=-(-scheduler.max_rows // scheduler.n_sub_batches),
        n_sub_batches=scheduler.n_sub_batches,
        prefill_tokens=scheduler.prefill_chunk_tokens or DEFAULT_PREFILL_TOKENS,
        look_ahead=scheduler.look_ahead,
    )


def case_table(report: dict[str, Any]) -> Table:
    table = Table(title=report["case"], title_justify="left")
    for title in ("predicted tokens/s", "measured", "measured / predicted", "binds"):
        table.add_column(title, justify="right")
    table.add_row(
        f"{report['predicted_tokens_per_s']:.4g}",
        f"{report['measured_tokens_per_s']:.4g}",
        f"{report['measured_over_predicted']:.2f}",
        report["binds"],
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


def _shapes(case: Case, model: Path) -> Shapes:
    checkpoint = open_checkpoint(model)
    try:
        stored = torch_dtype(stored_dtype(checkpoint))
    finally:
        checkpoint.close()
    return Shapes(read_model_config(model), stored, case.engine.dtype)
