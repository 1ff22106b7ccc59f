"""The command line's options, each declared once: flag, environment variable, help, group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sl_serve.config import (
    ActivationName,
    AttentionPlacement,
    DeviceName,
    DTypeName,
    EngineConfig,
    KVDTypeName,
    LoadFormat,
    QueueConfig,
    SchedulerConfig,
)
from sl_serve.plan.budget import parse_size
from sl_serve.tools.formats import ToolParserName

DEFAULTS = SchedulerConfig()
MIN_CALIBRATION_TOKENS = 2048

MODEL_HELP = "A folder with config.json, a .gguf file, a Hugging Face id, or smollm2 (the demo)."
MEMORY, SCHEDULE, QUEUE = "Memory", "Scheduling", "Queue"
PLAN = "Planning"
CALIBRATION = "Calibration"
SERVER, SECURITY, PROMPT, SAMPLING = "Server", "Security", "Prompt", "Sampling"

Model = Annotated[str, typer.Argument(metavar="MODEL", envvar="SL_SERVE_MODEL", help=MODEL_HELP)]


def _option(panel: str, flag: str, help_text: str, **extra: object) -> object:
    """An option whose environment variable is its flag's name: --max-rows, SL_SERVE_MAX_ROWS."""
    variable = "SL_SERVE_" + flag.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        flag,
        envvar=variable,
        rich_help_panel=panel,
        help=help_text,
        **extra,  # type: ignore[arg-type]
    )


Device = Annotated[
    DeviceName,
    _option(
        MEMORY,
        "--device",
        "cpu: weights and KV used in place. cuda: an NVIDIA GPU. sim: a simulated accelerator.",
    ),
]
DType = Annotated[
    DTypeName | None,
    _option(MEMORY, "--dtype", "Arithmetic. Default: bfloat16 on cuda, else float32."),
]
KvDType = Annotated[
    KVDTypeName,
    _option(
        MEMORY,
        "--kv-dtype",
        "KV cache; auto: as --dtype. int8 and int4: 8.5 and 5 bits a number, scales included.",
    ),
]
Load = Annotated[
    LoadFormat,
    _option(
        MEMORY,
        "--load-format",
        "dummy: random weights; MODEL is a folder with config.json, or a name like opt-30b.",
    ),
]
Weights = Annotated[
    str,
    _option(
        MEMORY,
        "--weights",
        "Matrices in memory. auto: as the files have them; bf16, fp8, int8, int4: made while "
        "loading, by groups of 64 (fp8: 128), or by others: int4_g128, int8_g32_sym, ...",
        metavar="[auto|bf16|fp8|int8|int4|...]",
    ),
]
KvMemory = Annotated[
    str | None,
    _option(MEMORY, "--kv-memory", "KV cache, like 8GiB. Default: a share of what is free."),
]
HostMemory = Annotated[
    str | None,
    _option(
        MEMORY,
        "--host-memory",
        "Ceiling for the whole process, like 24GiB; layers beyond it stay on disk. Default: what "
        "is free.",
    ),
]
DeviceMemory = Annotated[
    str | None,
    _option(
        MEMORY,
        "--device-memory",
        "Ceiling for the accelerator's memory, like 16GiB; spare room holds layers. Default: what "
        "is free there.",
    ),
]
DiskDir = Annotated[
    str | None,
    _option(
        MEMORY,
        "--disk-dir",
        "Folder for layers that do not fit into memory, where the model's own files cannot be "
        "read as they are (GGUF, another dtype).",
    ),
]
MaxModelLen = Annotated[
    int | None,
    _option(
        MEMORY,
        "--max-model-len",
        "Longest prompt plus output in tokens. Default: the model's, or what KV memory allows.",
        min=1,
    ),
]
MaxRows = Annotated[
    int | None,
    _option(
        SCHEDULE,
        "--max-rows",
        f"Requests that run at once. Default: {DEFAULTS.max_rows}; on a GPU what is predicted to "
        "be fastest.",
        min=1,
    ),
]
SubBatches = Annotated[
    int | None,
    _option(
        SCHEDULE,
        "--sub-batches",
        f"Sub-batches that pass through each layer. Default: {DEFAULTS.n_sub_batches}, or as "
        "--max-rows.",
        min=1,
    ),
]
PrefillTokens = Annotated[
    int | None,
    _option(SCHEDULE, "--prefill-tokens", "Prompt tokens read per step, all requests.", min=1),
]
LookAhead = Annotated[
    int,
    _option(SCHEDULE, "--look-ahead", "Layers loading while one computes; 0: serial.", min=0),
]
Attention = Annotated[
    AttentionPlacement,
    _option(
        SCHEDULE,
        "--attention",
        "Who attends to KV in host memory. device: it crosses the link. host: the processor, "
        "beside it. auto: what is predicted to be faster where a GPU is tuned for, else device.",
    ),
]
Activations = Annotated[
    ActivationName,
    _option(
        SCHEDULE,
        "--activations",
        "What weights of 6 bits or fewer are multiplied with on the processor. int8: faster, and a "
        "little less exact (docs/quality.md).",
    ),
]
Threads = Annotated[int | None, _option(SCHEDULE, "--threads", "Default: one per core.", min=1)]
QueueRequests = Annotated[
    int, _option(QUEUE, "--queue-requests", "Waiting requests before 429.", min=1)
]
QueueTokens = Annotated[
    int,
    _option(QUEUE, "--queue-tokens", "Waiting prompt and output tokens before 429.", min=1),
]

Host = Annotated[
    str, _option(SERVER, "--host", "Address to listen on; 0.0.0.0 for all (set an API key).")
]
Port = Annotated[
    int, _option(SERVER, "--port", "Port to listen on; 0: any free one.", min=0, max=65535)
]
ServedNames = Annotated[
    list[str] | None,
    _option(
        SERVER, "--served-model-name", "Name in the API; repeat for aliases. Default: the MODEL's."
    ),
]
ToolParser = Annotated[
    ToolParserName,
    _option(
        SERVER,
        "--tool-parser",
        "How the model writes calls of tools; auto: told by its chat template, none: no tools.",
    ),
]
JobsDir = Annotated[
    Path | None,
    _option(
        SERVER,
        "--jobs-dir",
        "Folder for files and batch jobs, which outlive the process. Default: none, both are off.",
    ),
]
JobsQuota = Annotated[
    str | None,
    _option(
        SERVER, "--jobs-quota", "Uploads are refused once files there take this much, like 50GiB."
    ),
]
DrainTimeout = Annotated[
    float,
    _option(SERVER, "--drain-timeout", "Seconds running requests get after SIGTERM.", min=0),
]
StallFloor = Annotated[
    float,
    _option(
        SERVER,
        "--stall-floor",
        "Seconds that one of the first steps may take before /ready says 503; later ones are "
        "measured against the steps before them.",
        min=1,
    ),
]
LogJson = Annotated[bool, _option(SERVER, "--log-json", "Logs as JSON lines.")]
ApiKeys = Annotated[
    list[str] | None,
    _option(SECURITY, "--api-key", "Required from clients; repeat for several."),
]
AllowedHosts = Annotated[
    list[str] | None,
    _option(SECURITY, "--allowed-host", "Further Host name accepted on loopback without a key."),
]
CorsOrigins = Annotated[
    list[str] | None,
    _option(SECURITY, "--cors-origin", "Origin that browsers may call from; default none."),
]

Prompt = Annotated[
    str, _option(PROMPT, "--prompt", "The text to continue; - reads standard input.")
]
AsJson = Annotated[
    bool, _option(PROMPT, "--json", "Print text, token ids and finish reason as JSON.")
]
Chat = Annotated[bool, _option(PROMPT, "--chat", "Put the prompt into the model's chat template.")]
MaxTokens = Annotated[
    int | None,
    _option(SAMPLING, "--max-tokens", "Longest answer. Default: until the context is full.", min=0),
]
Temperature = Annotated[
    float, _option(SAMPLING, "--temperature", "0: always the most likely token.", min=0, max=2)
]
TopP = Annotated[float, _option(SAMPLING, "--top-p", "Nucleus size.", min=0, max=1)]
TopK = Annotated[int, _option(SAMPLING, "--top-k", "Most likely tokens kept; 0: all.", min=0)]
Seed = Annotated[int | None, _option(SAMPLING, "--seed", "For the same answer again.")]
Stop = Annotated[
    list[str] | None, _option(SAMPLING, "--stop", "Ends the answer; repeat for several.")
]


def _plan_option(flag: str, help_text: str) -> object:
    """Apart from `generate`, whose --prompt is a text."""
    variable = "SL_SERVE_PLAN_" + flag.removeprefix("--").upper()
    return typer.Option(flag, envvar=variable, rich_help_panel=PLAN, help=help_text, min=1)


Profile = Annotated[
    str | None,
    _option(PLAN, "--profile", "A machine that is not at hand, like t4. Default: this one."),
]
PromptTokens = Annotated[int, _plan_option("--prompt", "Prompt tokens of a request.")]
OutputTokens = Annotated[int, _plan_option("--gen", "Generated tokens of a request.")]
Requests = Annotated[int, _plan_option("--requests", "Requests, all there from the start.")]
MeasuredDir = Annotated[
    str | None, _option(MEMORY, "--disk-dir", "Folder on the disk that layers would be read from.")
]
ReportJson = Annotated[bool, _option(PLAN, "--json", "Print everything as JSON.")]

Out = Annotated[
    Path,
    typer.Argument(metavar="OUT", envvar="SL_SERVE_OUT", help="The folder to make; MODEL, later."),
]
CalibratedWeights = Annotated[
    str,
    _option(
        MEMORY,
        "--weights",
        "Matrices of layers. int4: groups of 64 inputs share a scale and a minimum; "
        "int4_g32_min, int4_g128_min: of 32 or 128.",
        metavar="[int4|int4_g32_min|...]",
    ),
]
CalibrationText = Annotated[
    Path | None,
    _option(
        CALIBRATION,
        "--text",
        "Plain text like that of the later use, which is the best there is. Default: what the "
        "model writes when left alone.",
    ),
]
CalibrationTokens = Annotated[
    int, _option(CALIBRATION, "--tokens", "Of the text, at most.", min=MIN_CALIBRATION_TOKENS)
]


def default_dtype(device: DeviceName) -> DTypeName:
    return "bfloat16" if device == "cuda" else "float32"


def is_tuned(device: DeviceName, max_rows: int | None, sub_batches: int | None) -> bool:
    """Whether the planner chooses the shape of a step: on a GPU, unless the user did."""
    return device == "cuda" and max_rows is None and sub_batches is None


def engine_config(
    *,
    device: DeviceName,
    dtype: DTypeName | None,
    kv_dtype: KVDTypeName,
    load_format: LoadFormat,
    weights: str,
    kv_memory: str | None,
    host_memory: str | None,
    device_memory: str | None,
    disk_dir: str | None,
    max_model_len: int | None,
    max_rows: int | None,
    sub_batches: int | None,
    prefill_tokens: int | None,
    look_ahead: int,
    attention: AttentionPlacement,
    activations: ActivationName,
    threads: int | None,
    queue: QueueConfig,
) -> EngineConfig:
    """Raises UserError for a size that cannot be read."""
    return EngineConfig(
        device=device,
        dtype=dtype or default_dtype(device),
        kv_dtype=kv_dtype,
        load_format=load_format,
        weights=weights,
        max_model_len=max_model_len,
        kv_memory_bytes=None if kv_memory is None else parse_size(kv_memory),
        host_memory_bytes=None if host_memory is None else parse_size(host_memory),
        device_memory_bytes=None if device_memory is None else parse_size(device_memory),
        disk_dir=disk_dir,
        attention=attention,
        activations=activations,
        n_threads=threads,
        scheduler=SchedulerConfig(
            max_rows=max_rows or DEFAULTS.max_rows,
            n_sub_batches=min(sub_batches or DEFAULTS.n_sub_batches, max_rows or DEFAULTS.max_rows),
            prefill_chunk_tokens=prefill_tokens or 0,
            look_ahead=look_ahead,
        ),
        queue=queue,
    )
