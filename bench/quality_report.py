"""The table of `bench quality`, on the terminal and in a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from bench.errors import BenchError

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
NAMES = ("weights", "activations", "KV")
FIGURES = ("layers", "KV of a token", "perplexity", "/ float32", "KL", "same top")
TITLES = (*NAMES, *FIGURES)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["weights"],
        row["activations"],
        row["kv"],
        f"{row['weight_bytes'] / 1e6:.1f} MB",
        f"{row['kv_token_bytes'] / 1e3:.1f} kB",
        f"{row['perplexity']:.3f}",
        f"{row['perplexity_ratio'] - 1:+.2%}",
        f"{row['mean_divergence']:.1e}",
        f"{row['agreement']:.2%}",
    )


def render(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['model']}, {report['tokens']:,} tokens", title_justify="left")
    for title in TITLES:
        table.add_column(title, justify="left" if title in NAMES else "right")
    for row in report["variants"]:
        table.add_row(*cells(row))
    return table


def markdown(report: dict[str, Any]) -> str:
    rule = ["---"] * len(NAMES) + ["---:"] * len(FIGURES)
    lines = [TITLES, rule, *(cells(row) for row in report["variants"])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def update_document(path: Path, report: dict[str, Any]) -> None:
    """Put the table between the document's two marks. Raises BenchError where they are missing."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{path} has no lines '{BEGIN}' and '{END}' to put the table between")
    path.write_text(f"{before}{BEGIN}\n{markdown(report)}\n{END}{after}")
