"""`python -m bench quality`: what shorter weights and shorter KV cost in quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console

from bench.errors import BenchError
from bench.machine import about_now
from bench.quality_report import render, update_document
from bench.quality_work import Variant, measure
from sl_serve.config import KVDTypeName

TEXT = Path(__file__).parent / "data" / "alice.txt"  # Lewis Carroll, 1865
N_TOKENS, WINDOW_TOKENS = 20_480, 512
WEIGHTS = "int8,fp8,int4,int4-calibrated,int4_g128"
KV_FORMATS = "bfloat16,int8,int4"
BOTH = "int8:int8,int4:int8,int4:int4"
ROUNDED = "auto,int4"


def run(
    model: Annotated[str, typer.Option(help="As sl-serve calls it.")] = "smollm2",
    weights: Annotated[
        str, typer.Option(help="Formats, or int4-calibrated; comma-separated.")
    ] = WEIGHTS,
    kv: Annotated[str, typer.Option(help="KV formats, with weights as they are.")] = KV_FORMATS,
    both: Annotated[str, typer.Option(help="Pairs, such as int4:int8.")] = BOTH,
    rounded: Annotated[
        str, typer.Option(help="Weights that are multiplied with activations in 8 bits.")
    ] = ROUNDED,
    text: Annotated[Path, typer.Option(help="What is read.", dir_okay=False)] = TEXT,
    tokens: Annotated[int, typer.Option(min=2, help="Of the text.")] = N_TOKENS,
    window: Annotated[int, typer.Option(min=2, help="Tokens read at once.")] = WINDOW_TOKENS,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it all.")] = None,
    document: Annotated[
        Path | None, typer.Option("--docs", help="A document whose table is replaced.")
    ] = None,
) -> None:
    """Perplexity of a text, and divergence from float32, for weight and KV formats."""
    try:
        content = text.read_text()
    except OSError as error:
        raise BenchError(f"{text}: cannot be read ({error.strerror})") from None
    report = {
        **about_now(),
        **measure(model, content, variants(weights, kv, both, rounded), tokens, window),
    }
    Console().print(render(report))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    if document is not None:
        update_document(document, report)


def variants(weights: str, kv: str, both: str, rounded: str) -> list[Variant]:
    """Each weight format with float32 KV, each KV format with the weights as they are, pairs; and
    weights that are multiplied with activations in 8 bits.

    Raises BenchError for what is none of these."""
    found = [Variant(name, "float32") for name in _names(weights)]
    found += [Variant("auto", _kv(name)) for name in _names(kv)]
    for pair in _names(both):
        name, colon, of_kv = pair.partition(":")
        if not colon:
            raise BenchError(f"--both: '{pair}' is not WEIGHTS:KV")
        found.append(Variant(name, _kv(of_kv)))
    found += [Variant(name, "float32", "int8") for name in _names(rounded)]
    return found


def _names(comma_separated: str) -> list[str]:
    return [name.strip() for name in comma_separated.split(",") if name.strip()]


def _kv(name: str) -> KVDTypeName:
    if name not in get_args(KVDTypeName):
        raise BenchError(f"'{name}' is no KV format; there are: {', '.join(get_args(KVDTypeName))}")
    return cast(KVDTypeName, name)
