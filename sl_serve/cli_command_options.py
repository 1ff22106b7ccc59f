"""Options of single commands, beside the engine's: `serve`, `generate`, `plan`, `quantise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sl_serve.cli_options import MEMORY, option
from sl_serve.tools.formats import ToolParserName

MIN_CALIBRATION_TOKENS = 2048

SERVER, SECURITY, PROMPT, SAMPLING = "Server", "Security", "Prompt", "Sampling"
PLAN, CALIBRATION = "Planning", "Calibration"
OF_PLAN = "PLAN_"  # apart from `generate`, whose --prompt is a text

Host = Annotated[
    str, option(SERVER, "--host", "Address to listen on; 0.0.0.0 for all (set an API key).")
]
Port = Annotated[
    int, option(SERVER, "--port", "Port to listen on; 0: any free one.", min=0, max=65535)
]
ServedNames = Annotated[
    list[str] | None,
    option(
        SERVER, "--served-model-name", "Name in the API; repeat for aliases. Default: the MODEL's."
    ),
]
ToolParser = Annotated[
    ToolParserName,
    option(
        SERVER,
        "--tool-parser",
        "How the model writes calls of tools; auto: told by its chat template, none: no tools.",
    ),
]
JobsDir = Annotated[
    Path | None,
    option(
        SERVER,
        "--jobs-dir",
        "Folder for files and batch jobs, which outlive the process. Default: none, both are off.",
    ),
]
JobsQuota = Annotated[
    str | None,
    option(
        SERVER, "--jobs-quota", "Uploads are refused once files there take this much, like 50GiB."
    ),
]
DrainTimeout = Annotated[
    float,
    option(SERVER, "--drain-timeout", "Seconds running requests get after SIGTERM.", min=0),
]
StallFloor = Annotated[
    float,
    option(
        SERVER,
        "--stall-floor",
        "Seconds that one of the first steps may take before /ready says 503; later ones are "
        "measured against the steps before them.",
        min=1,
    ),
]
LogJson = Annotated[bool, option(SERVER, "--log-json", "Logs as JSON lines.")]
ApiKeys = Annotated[
    list[str] | None,
    option(SECURITY, "--api-key", "Required from clients; repeat for several."),
]
AllowedHosts = Annotated[
    list[str] | None,
    option(SECURITY, "--allowed-host", "Further Host name accepted on loopback without a key."),
]
CorsOrigins = Annotated[
    list[str] | None,
    option(SECURITY, "--cors-origin", "Origin that browsers may call from; default none."),
]

Prompt = Annotated[str, option(PROMPT, "--prompt", "The text to continue; - reads standard input.")]
AsJson = Annotated[
    bool, option(PROMPT, "--json", "Print text, token ids and finish reason as JSON.")
]
Chat = Annotated[bool, option(PROMPT, "--chat", "Put the prompt into the model's chat template.")]
MaxTokens = Annotated[
    int | None,
    option(SAMPLING, "--max-tokens", "Longest answer. Default: until the context is full.", min=0),
]
Temperature = Annotated[
    float, option(SAMPLING, "--temperature", "0: always the most likely token.", min=0, max=2)
]
TopP = Annotated[float, option(SAMPLING, "--top-p", "Nucleus size.", min=0, max=1)]
TopK = Annotated[int, option(SAMPLING, "--top-k", "Most likely tokens kept; 0: all.", min=0)]
Seed = Annotated[int | None, option(SAMPLING, "--seed", "For the same answer again.")]
Stop = Annotated[
    list[str] | None, option(SAMPLING, "--stop", "Ends the answer; repeat for several.")
]


Profile = Annotated[
    str | None,
    option(PLAN, "--profile", "A machine that is not at hand, like t4. Default: this one."),
]
PromptTokens = Annotated[
    int, option(PLAN, "--prompt", "Prompt tokens of a request.", of=OF_PLAN, min=1)
]
OutputTokens = Annotated[
    int, option(PLAN, "--gen", "Generated tokens of a request.", of=OF_PLAN, min=1)
]
Requests = Annotated[
    int, option(PLAN, "--requests", "Requests, all there from the start.", of=OF_PLAN, min=1)
]
MeasuredDir = Annotated[
    str | None, option(MEMORY, "--disk-dir", "Folder on the disk that layers would be read from.")
]
ReportJson = Annotated[bool, option(PLAN, "--json", "Print everything as JSON.")]

Out = Annotated[
    Path,
    typer.Argument(metavar="OUT", envvar="SL_SERVE_OUT", help="The folder to make; MODEL, later."),
]
CalibratedWeights = Annotated[
    str,
    option(
        MEMORY,
        "--weights",
        "Matrices of layers. int4: groups of 64 inputs share a scale and a minimum; "
        "int4_g32_min, int4_g128_min: of 32 or 128.",
        metavar="[int4|int4_g32_min|...]",
    ),
]
CalibrationText = Annotated[
    Path | None,
    option(
        CALIBRATION,
        "--text",
        "Plain text like that of the later use, which is the best there is. Default: what the "
        "model writes when left alone.",
    ),
]
CalibrationTokens = Annotated[
    int, option(CALIBRATION, "--tokens", "Of the text, at most.", min=MIN_CALIBRATION_TOKENS)
]
