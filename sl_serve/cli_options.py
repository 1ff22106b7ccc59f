"""Options of the engine, each declared once: flag, environment variable, help, group."""

from __future__ import annotations

from typing import Annotated

import typer

from sl_serve.config import (
    ActivationName,
    AttentionPlacement,
    DeviceName,
    DTypeName,
    KVDTypeName,
    LoadFormat,
    SchedulerConfig,
)

DEFAULTS = SchedulerConfig()
MODEL_HELP = "A folder with config.json, a .gguf file, a Hugging Face id, or smollm2 (the demo)."
MEMORY, SCHEDULE, QUEUE = "Memory", "Scheduling", "Queue"

Model = Annotated[str, typer.Argument(metavar="MODEL", envvar="SL_SERVE_MODEL", help=MODEL_HELP)]


def option(
    panel: str, flag: str, help_text: str, *, short: str = "", of: str = "", **extra: object
) -> object:
    """An option whose environment variable is its flag's name: --max-rows, SL_SERVE_MAX_ROWS; where
    commands give one name different meanings, with the name of a command before it."""
    variable = f"SL_SERVE_{of}" + flag.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *([flag, short] if short else [flag]),
        envvar=variable,
        rich_help_panel=panel,
        help=help_text,
        **extra,  # type: ignore[arg-type]
    )


Device = Annotated[
    DeviceName,
    option(
        MEMORY,
        "--device",
        "cpu: weights and KV used in place. cuda: an NVIDIA GPU. sim: a simulated accelerator.",
    ),
]
DType = Annotated[
    DTypeName | None,
    option(MEMORY, "--dtype", "Arithmetic. Default: bfloat16 on cuda, else float32."),
]
KvDType = Annotated[
    KVDTypeName,
    option(
        MEMORY,
        "--kv-dtype",
        "KV cache; auto: as --dtype. int8 and int4: 8.5 and 5 bits a number, scales included.",
    ),
]
Load = Annotated[
    LoadFormat,
    option(
        MEMORY,
        "--load-format",
        "dummy: random weights; MODEL is a folder with config.json, or a name like opt-30b.",
    ),
]
Weights = Annotated[
    str,
    option(
        MEMORY,
        "--weights",
        "Matrices in memory. auto: as the files have them; bf16, fp8, int8, int4: made while "
        "loading, by groups of 64 (fp8: 128), or by others: int4_g128, int8_g32_sym, ...",
        metavar="[auto|bf16|fp8|int8|int4|...]",
    ),
]
KvMemory = Annotated[
    str | None,
    option(MEMORY, "--kv-memory", "KV cache, like 8GiB. Default: a share of what is free."),
]
HostMemory = Annotated[
    str | None,
    option(
        MEMORY,
        "--host-memory",
        "Ceiling for the whole process, like 24GiB; layers beyond it stay on disk. Default: what "
        "is free.",
    ),
]
DeviceMemory = Annotated[
    str | None,
    option(
        MEMORY,
        "--device-memory",
        "Ceiling for the accelerator's memory, like 16GiB; spare room holds layers. Default: what "
        "is free there.",
    ),
]
DiskDir = Annotated[
    str | None,
    option(
        MEMORY,
        "--disk-dir",
        "Folder for layers that do not fit into memory, where the model's own files cannot be "
        "read as they are (GGUF, another dtype).",
    ),
]
MaxModelLen = Annotated[
    int | None,
    option(
        MEMORY,
        "--max-model-len",
        "Longest prompt plus output in tokens. Default: the model's, or what KV memory allows.",
        min=1,
    ),
]
MaxRows = Annotated[
    int | None,
    option(
        SCHEDULE,
        "--max-rows",
        f"Requests that run at once. Default: {DEFAULTS.max_rows}; on a GPU what is predicted to "
        "be fastest.",
        min=1,
    ),
]
SubBatches = Annotated[
    int | None,
    option(
        SCHEDULE,
        "--sub-batches",
        f"Sub-batches that pass through each layer. Default: {DEFAULTS.n_sub_batches}, or as "
        "--max-rows.",
        min=1,
    ),
]
PrefillTokens = Annotated[
    int | None,
    option(SCHEDULE, "--prefill-tokens", "Prompt tokens read per step, all requests.", min=1),
]
LookAhead = Annotated[
    int,
    option(SCHEDULE, "--look-ahead", "Layers loading while one computes; 0: serial.", min=0),
]
Attention = Annotated[
    AttentionPlacement,
    option(
        SCHEDULE,
        "--attention",
        "Who attends to KV in host memory. device: it crosses the link. host: the processor, "
        "beside it. auto: what is predicted to be faster where a GPU is tuned for, else device.",
    ),
]
Activations = Annotated[
    ActivationName,
    option(
        SCHEDULE,
        "--activations",
        "What weights of 6 bits or fewer are multiplied with on the processor. int8: faster, and a "
        "little less exact (docs/quality.md).",
    ),
]
Threads = Annotated[int | None, option(SCHEDULE, "--threads", "Default: one per core.", min=1)]
QueueRequests = Annotated[
    int, option(QUEUE, "--queue-requests", "Waiting requests before 429.", min=1)
]
QueueTokens = Annotated[
    int,
    option(QUEUE, "--queue-tokens", "Waiting prompt and output tokens before 429.", min=1),
]
