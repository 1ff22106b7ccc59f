from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from sl_serve import cli_load
from sl_serve.cli import app
from sl_serve.config import EngineConfig
from sl_serve.errors import UserError
from sl_serve.plan.profiles import PROFILES
from tests.plan.examples import shorten_probes
from tests.test_cli import sl_serve

GIB = 1 << 30


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_probes(monkeypatch)


def test_a_shape_on_a_machine_that_is_not_there(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["plan", "opt-30b", "--profile", "t4", "--gen", "32", "--requests", "64"]
    code, out, _ = sl_serve(capfd, monkeypatch, *asked, "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert found["hardware"]["name"] == "t4"
    assert found["workload"] == {"prompt_tokens": 512, "output_tokens": 32, "n_requests": 64}
    placed, layers = found["placement"], found["model"]["n_layers"]
    assert layers == 48
    assert sum(placed[f"n_{tier}_layers"] for tier in ("device", "host", "disk")) == layers
    for tier, n_bytes in found["memory_bytes"].items():
        assert n_bytes <= found["budgets_bytes"][tier] <= getattr(PROFILES["t4"], f"{tier}_bytes")
        assert n_bytes == sum(p["n_bytes"] for p in found["memory"] if p["tier"] == tier)
    assert found["prediction"]["tokens_per_s"] > 0
    assert all(h["times_faster"] > 1 for h in found["would_help"])
    code, out, _ = sl_serve(capfd, monkeypatch, *asked)
    text = " ".join(out.split())
    assert "opt-30b on t4: what goes where" in text
    assert f"{found['prediction']['tokens_per_s']:.3g} tokens/s over 64 requests" in text
    assert "would help: twice the" in text
    rows = placed["rows"] * placed["n_sub_batches"]
    assert f"sl-serve serve opt-30b --max-rows {rows} " in text


def test_budgets_are_ceilings(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("plan", "opt-6.7b", "--profile", "a100-80g", "--json")
    sizes = ("--device-memory", "4GiB", "--host-memory", "24GiB")
    _, out, _ = sl_serve(capfd, monkeypatch, *asked, *sizes)
    found = json.loads(out)
    assert found["budgets_bytes"]["device"] == 4 * GIB
    assert found["memory_bytes"]["device"] <= 4 * GIB
    assert found["memory_bytes"]["host"] <= 24 * GIB


def served(monkeypatch: pytest.MonkeyPatch, model: str, flags: list[str]) -> EngineConfig:
    """What `serve` would run with."""
    configs: list[EngineConfig] = []

    def load(found: str, config: EngineConfig, *_: object, tuned: bool) -> None:
        assert found == model and not tuned
        configs.append(config)
        raise UserError("enough")

    monkeypatch.setattr(cli_load, "load_engine", load)
    arguments = ["serve", model, "--port", "0", *shlex.split(" ".join(flags))]
    assert str(CliRunner().invoke(app, arguments).exception) == "enough"
    return configs[0]


@pytest.mark.parametrize("attention", ["device", "host"])
def test_the_command_says_all_that_was_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    asked = ["--attention", attention, "--weights", "int4_g128", "--kv-dtype", "int8"]
    asked += ["--device-memory", "12 GiB", "--host-memory", "100GiB", "--disk-dir", "/a disk"]
    asked += ["--threads", "3", "--json"]
    _, out, _ = sl_serve(capfd, monkeypatch, "plan", "opt-30b", "--profile", "t4", *asked)
    found = json.loads(out)
    config = served(monkeypatch, "opt-30b", found["serve_flags"])
    assert (config.device, config.dtype) == ("cuda", "bfloat16")  # what blocks are expanded to
    assert (config.attention, config.weights, config.kv_dtype) == (attention, "int4_g128", "int8")
    assert config.device_memory_bytes == 12 * GIB and config.host_memory_bytes == 100 * GIB
    assert (config.disk_dir, config.n_threads, config.load_format) == ("/a disk", 3, "dummy")
    placed, scheduler = found["placement"], config.scheduler
    assert scheduler.max_rows == placed["rows"] * placed["n_sub_batches"]
    assert scheduler.n_sub_batches == placed["n_sub_batches"]
    assert scheduler.prefill_chunk_tokens == placed["prefill_tokens"]


def test_the_command_says_nothing_that_needs_not_be(
    tiny: tuple[Path, LlamaForCausalLM],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["--prompt", "20", "--gen", "4", "--requests", "3", "--json"]
    for machine, more in (("laptop", {}), ("t4", {"--device": "cuda", "--dtype": "float32"})):
        _, out, _ = sl_serve(capfd, monkeypatch, "plan", str(tiny[0]), *asked, "--profile", machine)
        flags = dict(flag.split() for flag in json.loads(out)["serve_flags"])
        cut = {"--max-rows", "--sub-batches", "--prefill-tokens"}
        assert {k: v for k, v in flags.items() if k not in cut} == more
        assert served(monkeypatch, str(tiny[0]), json.loads(out)["serve_flags"]).dtype == "float32"


def test_a_model_on_this_machine(
    tiny: tuple[Path, LlamaForCausalLM],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ("plan", str(tiny[0]), "--prompt", "20", "--gen", "4", "--requests", "3", "--json")
    code, out, _ = sl_serve(capfd, monkeypatch, *asked, "--threads", "1")
    found = json.loads(out)
    assert code == 0
    assert found["hardware"]["name"] == "this machine"
    assert found["placement"]["rows"] == 3
    assert found["placement"]["n_host_layers"] == 3
    assert found["prediction"]["decode"]["resource_s"]["link down"] == 0


def test_weights_are_counted_as_asked_for(
    tiny: tuple[Path, LlamaForCausalLM],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ("plan", str(tiny[0]), "--prompt", "20", "--gen", "4", "--requests", "3", "--json")
    layer_bytes = []
    for weights in ("auto", "int4"):
        monkeypatch.setenv("SL_SERVE_WEIGHTS", weights)
        _, out, _ = sl_serve(capfd, monkeypatch, *asked, "--threads", "1")
        layer_bytes.append(json.loads(out)["model"]["layer_bytes"])
    assert layer_bytes[1] < 0.3 * layer_bytes[0]  # of float32; vectors and whole pages stay
    code, _, err = sl_serve(capfd, monkeypatch, *asked, "--weights", "int3")
    assert code == 2 and "--weights 'int3' is not known" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "t5"], "error: no profile is named 't5'; there are: t4, a10g"),
        (["--profile", "laptop", "--host-memory", "1GiB"], "raise --host-memory to "),
        (["--profile", "t4", "--device-memory", "9 apples"], "error: '9 apples' is no size"),
        (["--profile", "t4", "--prompt", "2048"], "pass the 2048 positions of opt-30b"),
    ],
)
def test_mistakes_are_one_sentence(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    code, out, err = sl_serve(capfd, monkeypatch, "plan", "opt-30b", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_doctor(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = sl_serve(capfd, monkeypatch, "doctor", "--disk-dir", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["facts"]["disk_dir"] == str(tmp_path)
    assert all({"name", "what", "advice"} == finding.keys() for finding in found["findings"])
    code, out, _ = sl_serve(capfd, monkeypatch, "doctor")
    assert code == 0
    assert "host memory reads" in out


def test_every_flag_is_an_environment_variable_of_its_own() -> None:
    command = typer.main.get_command(app)
    for name in ("plan", "doctor"):
        for parameter in command.commands[name].params:  # type: ignore[attr-defined]
            if parameter.name != "help":
                assert parameter.envvar.startswith("SL_SERVE_"), f"{name} {parameter.opts}"
                assert parameter.help, f"{name} {parameter.opts}"
                # which holds a text for `generate`
                assert parameter.envvar != "SL_SERVE_PROMPT"
