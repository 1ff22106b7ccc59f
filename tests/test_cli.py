"""The command line as a process: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import typer
from transformers import LlamaForCausalLM

from sl_serve.cli import app, main

COMMAND = [sys.executable, "-c", "from sl_serve.cli import main; main()"]


@pytest.fixture
def folder(tiny: tuple[Path, LlamaForCausalLM]) -> Path:
    return tiny[0]


def sl_serve(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    """Exit code, standard output, standard error; in this process, because imports take seconds."""
    monkeypatch.setattr(sys, "argv", ["sl-serve", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    out, err = capfd.readouterr()
    return int(exited.value.code or 0), out, " ".join(err.split())


def test_generate_json(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", str(folder), "--prompt", "Hello", "--max-tokens", "6", "--json")
    code, out, _ = sl_serve(capfd, monkeypatch, *asked)
    answer = json.loads(out)
    assert code == 0
    assert answer["prompt"] == "Hello"
    assert answer["finish_reason"] in {"length", "stop"}
    assert answer["completion_tokens"] == len(answer["token_ids"]) <= 6
    assert answer["prompt_tokens"] == 5
    _, again, _ = sl_serve(capfd, monkeypatch, *asked, "--device", "sim")
    assert json.loads(again)["token_ids"] == answer["token_ids"]


def test_generate_prints_text_alone_and_the_plan_aside(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", str(folder), "--prompt", "Hello", "--max-tokens", "4")
    _, whole, _ = sl_serve(capfd, monkeypatch, *asked, "--json")
    code, out, err = sl_serve(capfd, monkeypatch, *asked, "--kv-memory", "3MiB")
    assert code == 0
    assert out == json.loads(whole)["text"] + "\n"
    assert "what goes where" in err
    assert "3 MiB" in err


def test_generate_with_random_weights_needs_settings_alone(
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    dummy = ("--prompt", "Hello", "--load-format", "dummy")
    asked = (*dummy, "--max-tokens", "4", "--json")
    code, out, _ = sl_serve(capfd, monkeypatch, "generate", str(tmp_path), *asked)
    assert code == 0
    assert json.loads(out)["prompt_tokens"] == 5
    code, _, err = sl_serve(capfd, monkeypatch, "generate", "opt-31b", *dummy)
    assert code == 2
    assert "error: opt-31b: random weights need a folder with config.json, or one of" in err
    assert "opt-30b" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-memory", "8 apples"], "error: '8 apples' is no size; write it like 700MB"),
        (["--kv-memory", "900TB"], "error: --kv-memory asks for 838190.3 GiB"),
        (["--kv-memory", "64KiB", "--max-model-len", "200"], "lower --max-model-len to 80"),
        (["--prompt", "x" * 300], "error: the prompt has 300 tokens, the context 256"),
        (["--prompt", ""], "error: the prompt is empty"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    asked = ["generate", str(folder), "--prompt", "Hello", *arguments]
    code, out, err = sl_serve(capfd, monkeypatch, *asked)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_bad_models_are_named(
    tmp_path: Path,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    smollm2_path: Path,
) -> None:
    def refusal(model: Path | str) -> str:
        code, _, err = sl_serve(capfd, monkeypatch, "generate", str(model), "--prompt", "x")
        assert code == 2
        assert "Traceback" not in err
        return err

    assert "no such model" in refusal(tmp_path / "nowhere")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_path.read_bytes()[:5_000_000])
    assert "cut.gguf" in refusal(cut)
    strange = tmp_path / "strange"
    strange.mkdir()
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba9"}
    (strange / "config.json").write_text(json.dumps(settings))
    assert "mamba9" in refusal(strange)
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in folder.iterdir():
        (torn / file.name).write_bytes(file.read_bytes()[: 20_000 if "safe" in file.name else None])
    assert "model.safetensors" in refusal(torn)


def test_a_taken_port_is_known_before_the_model_is_loaded(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = sl_serve(capfd, monkeypatch, "serve", str(folder), "--port", port)
    assert code == 2
    assert f"port {port} on 127.0.0.1 is taken" in err
    assert "what goes where" not in err


def test_every_flag_is_an_environment_variable() -> None:
    command = typer.main.get_command(app)
    for name in ("serve", "generate", "quantise"):
        for parameter in command.commands[name].params:  # type: ignore[attr-defined]
            if parameter.name == "help":
                continue
            expected = "SL_SERVE_" + (parameter.opts[0].lstrip("-").replace("-", "_").upper())
            assert parameter.envvar == expected, f"{name} {parameter.opts}"
            assert parameter.help, f"{name} {parameter.opts}"


def test_version(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = sl_serve(capfd, monkeypatch, "--version")
    assert code == 0
    assert re.fullmatch(r"sl-serve \d+\.\d+\.\d+\n", out)


def test_serve_answers_drains_and_leaves(folder: Path, tmp_path: Path) -> None:
    """A real process: ready line, an answer, SIGTERM, exit code 0."""
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, "serve", str(folder), "--port", "0"],
            stderr=log,
            env=os.environ | {"SL_SERVE_SERVED_MODEL_NAME": "from-environment"},
        )
    try:
        url = wait_for_url(process, tmp_path / "log")
        models = httpx.get(f"{url}/v1/models", timeout=30).json()
        assert models["data"][0]["id"] == "from-environment"
        body = {"model": "from-environment", "prompt": "abc", "max_tokens": 3}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    while process.poll() is None:
        time.sleep(0.05)
        found = re.search(r"ready on (http://[\d.:]+)", log.read_text())
        if found:
            return found[1]
    raise AssertionError(log.read_text())
