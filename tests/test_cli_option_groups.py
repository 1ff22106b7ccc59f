"""Groups of options: what a command gets of what was typed."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from sl_serve.cli_option_groups import EngineOptions, StepOptions, with_options
from sl_serve.config import QueueConfig, SchedulerConfig

got: list[tuple[str, StepOptions, EngineOptions]] = []


def command(name: str, *, step: StepOptions, options: EngineOptions) -> None:
    got.append((name, step, options))


def run(*arguments: str, **variables: str) -> tuple[str, StepOptions, EngineOptions]:
    app = typer.Typer()
    app.command()(with_options(command))
    result = CliRunner().invoke(app, arguments, env=variables)
    assert result.exit_code == 0, result.output
    return got.pop()


def test_left_alone_they_are_the_defaults() -> None:
    assert run("model") == ("model", StepOptions(), EngineOptions())


def test_flags_and_variables_reach_their_group() -> None:
    name, step, options = run(
        "model", "--max-rows", "3", "--kv-memory", "2GiB", SL_SERVE_LOOK_AHEAD="4"
    )
    assert (name, step.max_rows, step.look_ahead) == ("model", 3, 4)
    config = options.config(step, QueueConfig())
    assert config.kv_memory_bytes == 2 << 30
    assert config.scheduler == SchedulerConfig(max_rows=3, n_sub_batches=1, look_ahead=4)


def test_a_step_is_tuned_on_a_gpu_unless_its_shape_was_given() -> None:
    on_gpu = EngineOptions(device="cuda")
    assert on_gpu.is_tuned(StepOptions(look_ahead=2))
    assert not on_gpu.is_tuned(StepOptions(sub_batches=2))
    assert not EngineOptions().is_tuned(StepOptions())
