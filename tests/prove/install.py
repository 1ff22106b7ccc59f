"""The Dockerfile's steps work in an empty environment: build, install, start, answer, stop.

Usage: scripts/prove install

No image is built: what the Dockerfile copies, its pip commands, its environment, its start command
and its health check are taken from it and used in a temporary folder. Needs pip to reach an index,
or wheels at hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clients.server_process import ServerProcess, free_port
from tests.container_file import ROOT, STAGES, health_command, start_command
from tests.models import write_tiny_llama

READY_S, STOP_S = 300.0, 60.0


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = installed(folder)
        write_tiny_llama(folder / "model")
        serve(folder, environment)
    return 0


def installed(folder: Path) -> dict[str, str]:
    """The environment that the image's commands run in."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SL_SERVE_")}
    binaries = folder / "venv" / "bin"
    environment = kept | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    copy_sources(folder / "src")
    (wheel,) = [run for run in STAGES["build"].all("RUN") if "pip wheel" in run]
    shell(wheel, folder, environment)
    print("install: the wheel is built", flush=True)
    install = STAGES["cpu"].all("RUN")[-1].split("&&")[-1]  # after torch, which is at hand
    shell(install, folder, environment)
    where = "import sl_serve, sl_serve._native; print(sl_serve.__file__)"
    command = [str(binaries / "python"), "-c", where]
    place = subprocess.run(command, check=True, cwd=folder, text=True, capture_output=True).stdout
    assert place.startswith(str(folder / "venv")), f"not a copy: {place}"
    print("install: installed with its native core, not editable", flush=True)
    return environment


def copy_sources(to: Path) -> None:
    to.mkdir()
    for step in STAGES["build"].all("COPY"):
        for source in map(ROOT.joinpath, step.split()[:-1]):
            if source.is_dir():
                built = shutil.ignore_patterns("*.so", "__pycache__", "results")
                shutil.copytree(source, to / source.name, ignore=built)
            else:
                shutil.copy(source, to)


def shell(command: str, folder: Path, environment: dict[str, str]) -> None:
    """A RUN step, with the image's paths in the folder."""
    here = command.replace("/etc/sl-serve/", f"{ROOT}/").replace("/wheels", f"{folder}/wheels")
    subprocess.run(["bash", "-euc", here], check=True, cwd=folder / "src", env=environment)


def serve(folder: Path, environment: dict[str, str]) -> None:
    stage = STAGES["cpu"]
    port = free_port()
    there = {
        **stage.environment,
        "SL_SERVE_HOST": "127.0.0.1",
        "SL_SERVE_PORT": str(port),
        "SL_SERVE_JOBS_DIR": str(folder / "jobs"),
        "SL_SERVE_MODEL": str(folder / "model"),
        "SL_SERVE_API_KEY": "a-key",
    }
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            start_command(stage), cwd=folder, env=environment | there, stdout=output, stderr=output
        )
    try:
        server = ServerProcess(process, f"http://127.0.0.1:{port}", log)
        print(f"install: ready after {server.wait_ready(READY_S):.0f} s", flush=True)
        subprocess.run(health_command(stage), check=True, env=environment | there)
        print("install: the health check passes", flush=True)
        answers(server.url)
        server.stop(STOP_S)
        print("install: SIGTERM ended it with exit code 0", flush=True)
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> None:
    asked = {"prompt": "Hello", "max_tokens": 4, "ignore_eos": True}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        assert client.post("/v1/completions", json=asked).status_code == 401
        client.headers["Authorization"] = "Bearer a-key"
        answer = client.post("/v1/completions", json=asked).raise_for_status().json()
        assert answer["usage"]["completion_tokens"] == 4
        assert client.get("/v1/batches").is_success
        page = client.get("/", headers={"Authorization": ""}).raise_for_status()
        assert "<title>sl-serve</title>" in page.text
    print("install: completion, jobs and page answer", flush=True)


if __name__ == "__main__":
    sys.exit(main())
