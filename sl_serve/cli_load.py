"""What the commands do with a model: load it before the user's eyes, and run one prompt."""

from __future__ import annotations

import queue
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sl_serve.config import EngineConfig
from sl_serve.core import Request, SamplingParams, TokenOut
from sl_serve.engine import Engine
from sl_serve.errors import EngineDeadError
from sl_serve.llm import open_engine, open_model
from sl_serve.plan.budget import gib
from sl_serve.plan.memory import MemoryPlan
from sl_serve.weights.checkpoint import Checkpoint


def model_name(model: str) -> str:
    """How the API calls a MODEL argument: its last part, without .gguf."""
    if Path(model).exists():
        return Path(model).resolve().name.removesuffix(".gguf")
    return model


def load_engine(
    model: str,
    config: EngineConfig,
    console: Console,
    quiet: bool = False,
    tuned: bool = False,
) -> Engine:
    """Print the memory plan, load with a progress bar, start the engine. `tuned`: with the
    settings that the planner finds, instead of those of `config`."""
    checkpoint = open_model(model, config.load_format, console.print)
    if tuned:
        config = _tune(checkpoint, config, console)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=quiet, transient=True)
    task = bar.add_task("loading layers", total=checkpoint.config.n_layers)

    def on_plan(plan: MemoryPlan) -> None:
        if not quiet:
            console.print(plan_table(checkpoint.path.name, plan))

    try:
        with bar:
            return open_engine(checkpoint, config, on_plan, lambda: bar.advance(task))
    finally:
        checkpoint.close()


def _tune(checkpoint: Checkpoint, config: EngineConfig, console: Console) -> EngineConfig:
    from sl_serve.tuning import tune

    with console.status("measuring") as status:
        found = tune(checkpoint, config, lambda what: status.update(f"measuring {what}"))
    placement, prediction = found.plan.placement, found.plan.prediction
    console.print(
        f"tuned: {placement.n_sub_batches} sub-batches of {placement.rows} requests, "
        f"{placement.prefill_tokens} prompt tokens a step; predicted "
        f"{prediction.tokens_per_s:.4g} tokens/s, bound by {prediction.binds}"
    )
    return found.config


def plan_table(name: str, plan: MemoryPlan) -> Table:
    table = Table(title=f"{name}: what goes where in {gib(plan.available_bytes)} of free memory")
    table.add_column("part")
    table.add_column("memory", justify="right")
    table.add_column("")
    for what, n_bytes, remark in plan.table():
        table.add_row(what, gib(n_bytes), remark)
    table.add_section()
    table.add_row("together", gib(plan.total_bytes), f"context up to {plan.max_model_len} tokens")
    return table


def generate_once(
    engine: Engine, prompt: str, sampling: SamplingParams, *, chat: bool, show: bool
) -> dict[str, object]:
    """Run one prompt; with `show`, print its text as it comes."""
    tokenizer = engine.tokenizer
    text = tokenizer.render_chat([{"role": "user", "content": prompt}]) if chat else prompt
    prompt_ids = tokenizer.encode(text, add_special_tokens=not chat)
    news: queue.SimpleQueue[TokenOut] = queue.SimpleQueue()
    engine.submit([Request("generate", prompt_ids, sampling, news.put)])
    texts: list[str] = []
    token_ids: list[int] = []
    while True:
        out = news.get()
        texts.append(out.text)
        token_ids += out.token_ids
        if show:
            print(out.text, end="", flush=True)
        if out.error is not None:
            raise EngineDeadError(out.error)
        if out.finish_reason is not None:
            break
    if show:
        print()
    return {
        "text": "".join(texts),
        "token_ids": token_ids,
        "finish_reason": out.finish_reason,
        "prompt_tokens": out.usage.prompt_tokens,
        "completion_tokens": out.usage.completion_tokens,
    }
