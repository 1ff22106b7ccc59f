"""A schedule on hardware that is not there: the real engine's steps on the simulated device's
virtual clock, beside what the planner's formulas say of the same steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from threading import Semaphore
from typing import Any

from rich.table import Table

from bench.errors import BenchError
from sl_serve.config import DTypeName, EngineConfig, SchedulerConfig
from sl_serve.core import Request, SamplingParams, TokenOut
from sl_serve.device.sim import HardwareProfile, SimDevice
from sl_serve.engine import Engine
from sl_serve.llm import UNBOUNDED_QUEUE
from sl_serve.loader import load
from sl_serve.plan.hardware import AttentionRates, Hardware, roofline
from sl_serve.plan.model_reader import read_sizes, stored_formats, torch_dtype
from sl_serve.plan.model_sizes import ModelSizes
from sl_serve.plan.placement import Placement, Workload
from sl_serve.plan.planner import AttentionPlace
from sl_serve.plan.predict import StepTime, predict
from sl_serve.plan.profiles import PROFILES
from sl_serve.stats import StepStats
from sl_serve.weights.checkpoint import Checkpoint, open_checkpoint
from sl_serve.weights.dummy import open_dummy

ROWS, SUB_BATCHES, OUTPUT_TOKENS, PROMPT_TOKENS = 16, 4, 12, 96
DTYPE: DTypeName = "float32"  # what the simulated device computes in


def simulation(
    model: str,
    profile: str,
    look_aheads: tuple[int, ...] = (1, 0),
    attentions: tuple[AttentionPlace, ...] = ("device", "host"),
) -> dict[str, Any]:
    """`model`: a shape's name, or a folder with weights. JSON-ready, times in seconds.

    Raises BenchError for an unknown profile, ModelError for an unknown model.
    """
    if profile not in PROFILES:
        raise BenchError(f"no profile is named {profile!r}; there are: {', '.join(PROFILES)}")
    hardware = as_simulated(PROFILES[profile])
    checkpoint = open_checkpoint(Path(model)) if Path(model).exists() else open_dummy(model)
    rows = []
    for attention, look_ahead in product(attentions, look_aheads):
        simulated_s = _simulated_decode_s(checkpoint, hardware, look_ahead, attention)
        predicted = _predicted_decode(checkpoint, hardware, look_ahead, attention)
        rows.append(
            {
                "attention": attention,
                "look_ahead": look_ahead,
                "simulated_step_s": simulated_s,
                "predicted_step_s": predicted.step_s,
                "ratio": predicted.step_s / simulated_s,
                "binds": predicted.binds,
                "resource_s": predicted.resource_s,
            }
        )
    checkpoint.close()
    return {"model": model, "profile": profile, "dtype": DTYPE, "rows": rows}


def simulation_table(report: dict[str, Any]) -> Table:
    title = f"{report['model']} in {report['dtype']} on {report['profile']}: a step of decoding"
    table = Table(title=title)
    columns = ("simulated ms", "predicted ms", "predicted/simulated", "binds")
    for column in ("attention", "look-ahead", *columns):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        times = (row["simulated_step_s"] * 1e3, row["predicted_step_s"] * 1e3, row["ratio"])
        cut = row["attention"], str(row["look_ahead"])
        table.add_row(*cut, *(f"{t:.3f}" for t in times), row["binds"])
    return table


def as_simulated(hardware: Hardware) -> Hardware:
    """What the virtual clock knows of a machine: one rate per direction, one of arithmetic, one of
    attention by the processor."""
    matmul = roofline(hardware.matmul.peak_flops_per_s, 1.0, 1.0)
    return replace(
        hardware,
        link_down_both_bytes_per_s=hardware.link_down_bytes_per_s,
        link_up_both_bytes_per_s=hardware.link_up_bytes_per_s,
        host_read_bytes_per_s=1e18,
        device_read_bytes_per_s=1e18,
        matmul=matmul,
        head=matmul,
        attention=AttentionRates(1e18, matmul.peak_flops_per_s),
        elementwise_bytes_per_s=1e18,
        cell_overhead_s=0.0,
        host_attention=hardware.host_attention._replace(flops_per_s=1e18),
    )


def _simulated_decode_s(
    checkpoint: Checkpoint, hardware: Hardware, look_ahead: int, attention: AttentionPlace
) -> float:
    """Mean over the steps in which every row decodes."""
    device = SimDevice(HardwareProfile.of(hardware))
    config = EngineConfig(
        device="sim",
        kv_memory_bytes=None,
        max_model_len=PROMPT_TOKENS + OUTPUT_TOKENS,
        attention=attention,
        queue=UNBOUNDED_QUEUE,
        scheduler=SchedulerConfig(
            max_rows=ROWS,
            n_sub_batches=SUB_BATCHES,
            prefill_chunk_tokens=ROWS * PROMPT_TOKENS,
            look_ahead=look_ahead,
        ),
    )
    times_s: list[float] = []

    def note(step: StepStats) -> None:
        if not step.n_prefill_tokens:
            times_s.append(device.time_s)

    engine = Engine(load(checkpoint, config, device=device), checkpoint.load_tokenizer(), config)
    try:
        engine.on_step(note)
        _run(engine)
    finally:
        engine.close()
    return (times_s[-1] - times_s[0]) / (len(times_s) - 1)


def _run(engine: Engine) -> None:
    ended = Semaphore(0)

    def receive(out: TokenOut) -> None:
        if out.finish_reason is not None:
            ended.release()

    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    prompts = [[i + 3] * PROMPT_TOKENS for i in range(ROWS)]
    engine.submit([Request(f"{i}", p, sampling, receive) for i, p in enumerate(prompts)])
    for _ in prompts:
        ended.acquire()


def _predicted_decode(
    checkpoint: Checkpoint, hardware: Hardware, look_ahead: int, attention: AttentionPlace
) -> StepTime:
    sizes = _sizes(checkpoint)
    placement = Placement(
        n_device_layers=0,
        n_host_layers=sizes.n_layers,
        n_disk_layers=0,
        rows=ROWS // SUB_BATCHES,
        n_sub_batches=SUB_BATCHES,
        prefill_tokens=ROWS * PROMPT_TOKENS,
        look_ahead=look_ahead,
        attention=attention,
    )
    return predict(sizes, placement, hardware, Workload(PROMPT_TOKENS, OUTPUT_TOKENS, ROWS)).decode


def _sizes(checkpoint: Checkpoint) -> ModelSizes:
    dtype = torch_dtype(DTYPE)
    formats = stored_formats(checkpoint, has_device=True)
    return read_sizes("simulated", checkpoint.config, dtype, dtype, formats, has_device=True)
