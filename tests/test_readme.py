"""Every command and every Python block of the README runs."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import openai
import pytest
from transformers import LlamaForCausalLM

from server.settings import ServerSettings
from tests.batch.jobs import jsonl, line, wait_for
from tests.engine.running import config, engine
from tests.models import write_tiny_llama
from tests.server.conftest import LiveServer
from tests.server.fake_engine import FakeEngine
from tests.test_cli import wait_for_url
from tests.test_deploy import check_docker_build, check_docker_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [
    line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line
]


def run(command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A README command as it stands, with this interpreter's environment for .venv/bin."""
    program, *arguments = shlex.split(command)
    program = str(Path(sys.executable).parent / Path(program).name)
    return subprocess.run(
        [program, *arguments],
        cwd=ROOT,
        text=True,
        check=True,
        capture_output=True,
        timeout=300,
        **options,  # type: ignore[call-overload]
    )


def is_a_script(command: str) -> None:
    """Run by CI itself."""
    assert os.access(ROOT / command, os.X_OK)
    assert command in (ROOT / ".ci/run").read_text()


def prints(pattern: str) -> Callable[[str], None]:
    def check(command: str) -> None:
        assert re.search(pattern, run(command).stdout)

    return check


def serves(command: str) -> None:
    program = Path(sys.executable).parent / "sl-serve"
    log = ROOT / ".cache" / "readme-serve.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [program, *shlex.split(command)[1:], "--port", "0"], stderr=stderr
        )
    try:
        wait_for_url(process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def serves_jobs(command: str) -> None:
    with TemporaryDirectory() as folder:
        there = command.replace("--jobs-dir jobs", f"--jobs-dir {folder}/jobs")
        assert there != command
        serves(there)
        assert (Path(folder) / "jobs" / "jobs.sqlite").exists()


def requests_in(folder: str) -> Path:
    path = Path(folder) / "requests.jsonl"
    body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 4}
    path.write_bytes(jsonl([line("only", body | {"temperature": 0})]))
    return path


def runs_a_file(command: str) -> None:
    with TemporaryDirectory() as folder:
        there = command.replace("requests.jsonl", str(requests_in(folder)))
        answers = Path(folder) / "answers.jsonl"
        run(there.replace("answers.jsonl", str(answers)))
        assert '" Paris' in answers.read_text()


def submits(command: str) -> None:
    fake = FakeEngine()
    with TemporaryDirectory() as folder:
        settings = ServerSettings(served_model_names=("smollm2",), jobs_dir=Path(folder) / "jobs")
        there = command.replace("requests.jsonl", str(requests_in(folder)))
        with LiveServer(fake, settings) as live:
            answer = run(there, env=os.environ | {"SL_SERVE_URL": live.url})
            assert answer.stdout.startswith("batch_")
            service = live.app.state.context.batch_service()
            wait_for(lambda: service.batches.get(answer.stdout.strip()).status == "completed")
    fake.close()


def chats(command: str) -> None:
    """With a model that the server has, one question and goodbye."""
    names = ServerSettings(served_model_names=("tiny",))
    with TemporaryDirectory() as folder:
        write_tiny_llama(Path(folder))
        with (
            engine(Path(folder), config(max_rows=4)) as running,
            LiveServer(running, names) as live,
        ):
            there = command.replace("http://127.0.0.1:8000", live.url)
            assert there != command
            run(there, input="Hello\n/exit\n")
            assert running.snapshot().generated_tokens_total > 0


def benchmarks(command: str) -> None:
    """The same command on the case that is made for trying things out."""
    small = command.replace("smollm2-128x128-n256", "tiny-16x8-n8")
    assert small != command
    target = ROOT / ".cache" / "readme-bench.json"
    run(small.replace("result.json", str(target)))
    assert '"share_of_bound"' in target.read_text()


HOW: dict[str, Callable[[str], None]] = {
    "scripts/demo": is_a_script,
    "scripts/test": is_a_script,
    ".venv/bin/sl-serve serve smollm2": serves,
    '.venv/bin/sl-serve generate smollm2 --prompt "The capital of France is" '
    "--max-tokens 8 --json": prints(r'"text": " Paris'),
    ".venv/bin/sl-serve pull smollm2": prints(r"\.gguf\n"),
    ".venv/bin/sl-serve run-batch smollm2 --input requests.jsonl "
    "--output answers.jsonl": runs_a_file,
    ".venv/bin/sl-serve serve smollm2 --jobs-dir jobs": serves_jobs,
    ".venv/bin/sl-serve batches submit requests.jsonl": submits,
    "docker build --target cuda -t sl-serve:cuda .": check_docker_build,
    "docker run --gpus all --ulimit memlock=-1 --restart on-failure --stop-timeout 45 "
    "-p 127.0.0.1:8000:8000 -v models:/models -v jobs:/jobs -e SL_SERVE_API_KEY "
    "-e SL_SERVE_MODEL=org/name sl-serve:cuda": check_docker_run,
    ".venv/bin/sl-serve serve --help": prints("SL_SERVE_PORT"),
    ".venv/bin/sl-serve plan opt-30b --load-format dummy --profile t4 --prompt 512 "
    "--gen 32": prints("link down binds"),
    ".venv/bin/sl-serve doctor": prints("host memory reads"),
    ".venv/bin/sl-chat --url http://127.0.0.1:8000": chats,
    ".venv/bin/python -m bench run --case smollm2-128x128-n256 --peers transformers "
    "--json result.json": benchmarks,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    HOW[command](command)


def test_the_offline_block() -> None:
    (block,) = [b for b in blocks("python") if "sl_serve.llm" in b]
    answer = subprocess.run(
        [sys.executable, "-c", block], check=True, capture_output=True, text=True, timeout=120
    )
    assert len(answer.stdout.split()) > 5


def test_the_openai_blocks(
    tiny: tuple[Path, LlamaForCausalLM], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = [b for b in blocks("python") if "client" in b]
    names = ServerSettings(served_model_names=("smollm2",))
    with engine(tiny[0], config(max_rows=4)) as running, LiveServer(running, names) as live:
        scope: dict[str, object] = {}
        exec(first.replace("http://127.0.0.1:8000", live.url), scope)
        assert capsys.readouterr().out.strip()
        exec(second, scope)
        client = scope["client"]
        assert isinstance(client, openai.OpenAI)
        client.close()
    said = set(capsys.readouterr().out.splitlines())
    assert len(said & {"complaint", "question", "praise"}) == 1
