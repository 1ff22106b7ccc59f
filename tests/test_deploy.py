"""What docs/deploy.md and the files beside it say is true of the program. No image is built here;
scripts/prove install takes the Dockerfile's steps in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import RawConfigParser
from dataclasses import replace
from pathlib import Path

import pytest
import typer
import yaml
from click import Context
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.files_routes import upload_limit_bytes
from server.health import health_routes
from sl_serve.cli import app
from sl_serve.stats import EngineState
from tests.container_file import ROOT, STAGES, health_command, start_command
from tests.server.conftest import SETTINGS, LiveServer
from tests.server.fake_engine import FakeEngine

FOLDER = ROOT / "docs" / "deploy"
TEXT = (ROOT / "docs" / "deploy.md").read_text()
UNIT = (FOLDER / "sl-serve.service").read_text()
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVE = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
VARIABLES = {parameter.envvar for parameter in SERVE.params if parameter.envvar}
FINAL = ("cpu", "cuda")
CLOSING_S = 10  # at most, after the drain timeout


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


def settings_of(arguments: list[str]) -> Context:
    """As `sl-serve serve` understands them, with the environment as it is."""
    return SERVE.make_context("serve", arguments)


def drain_timeout_s(arguments: list[str]) -> float:
    return float(settings_of(arguments).params["drain_timeout"])


@pytest.mark.parametrize("name", FINAL)
def test_the_image_starts_what_its_environment_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = STAGES[name]
    for variable, value in stage.environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("SL_SERVE_MODEL", "org/name")
    program, command, *arguments = start_command(stage)
    assert (program, command) == ("sl-serve", "serve")
    found = settings_of(arguments).params
    assert found["model"] == "org/name"
    assert (found["host"], found["port"]) == ("0.0.0.0", 8000)
    assert found["device"] == ("cuda" if name == "cuda" else "cpu")
    assert found["jobs_dir"] == Path("/jobs")
    assert found["log_json"] is True
    volumes = json.loads(stage.last("VOLUME"))
    assert volumes == ["/models", "/jobs"]
    assert all(folder in stage.all("RUN")[0] for folder in volumes)  # owned by the user
    assert stage.last("EXPOSE") == "8000"


@pytest.mark.parametrize("name", FINAL)
def test_the_image_runs_without_privileges_and_ends_by_sigterm(name: str) -> None:
    stage = STAGES[name]
    assert stage.steps[-1] == ("USER", "sl-serve")
    assert f"useradd --uid 10001 --create-home {stage.last('USER')}" in stage.all("RUN")[0]
    assert stage.last("STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("name", FINAL)
def test_every_installation_is_pinned(name: str) -> None:
    installs = [
        part for run in STAGES[name].all("RUN") for part in run.split("&&") if "pip install" in part
    ]
    assert len(installs) == 2
    for part in installs:
        assert "-c /etc/sl-serve/requirements.lock" in part
    assert ("COPY", "requirements.lock /etc/sl-serve/requirements.lock") in STAGES[name].steps


def test_what_is_built_is_copied_and_not_ignored() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {p for step in STAGES["build"].all("COPY") for p in step.split()[:-1]}
    build = project["tool"]["scikit-build"]
    needed = {*build["wheel"]["packages"], build["cmake"]["source-dir"], "pyproject.toml"}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == needed
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == needed | {"requirements.lock"}
    assert all((ROOT / path).exists() for path in needed)


def test_the_health_check_follows_the_engine(engine: FakeEngine) -> None:
    command = health_command(STAGES["cpu"])
    assert command[0] == "python"
    with LiveServer(engine, SETTINGS) as live:
        environment = os.environ | {"SL_SERVE_PORT": str(live.port)}
        check = [sys.executable, *command[1:]]
        assert subprocess.run(check, check=False, env=environment, timeout=60).returncode == 0
        engine.state = EngineState.CLOSED
        assert subprocess.run(check, check=False, env=environment, timeout=60).returncode == 1


def test_every_variable_that_is_named_exists() -> None:
    files = [ROOT / "Dockerfile", ROOT / "README.md", ROOT / "docs/deploy.md", *FOLDER.iterdir()]
    found = {name for file in files for name in re.findall(r"\bSL_SERVE_[A-Z_]+", file.read_text())}
    assert len(found) > 6
    assert found <= VARIABLES


def test_compose() -> None:
    service = COMPOSE["services"]["sl-serve"]
    assert service["build"]["target"] in STAGES
    assert (FOLDER / service["build"]["context"]).resolve() == ROOT
    assert service["environment"].keys() <= VARIABLES
    assert service["environment"]["SL_SERVE_API_KEY"].startswith("${SL_SERVE_API_KEY:?")
    drain_s = float(service["environment"]["SL_SERVE_DRAIN_TIMEOUT"])
    assert int(service["stop_grace_period"].removesuffix("s")) > drain_s + CLOSING_S
    mounted = [volume.split(":")[1] for volume in service["volumes"]]
    assert mounted == json.loads(STAGES["cuda"].last("VOLUME"))
    named = {v.split(":")[0] for s in COMPOSE["services"].values() for v in s["volumes"]}
    assert {name for name in named if not name.startswith("./")} == COMPOSE["volumes"].keys()
    assert all((FOLDER / name).exists() for name in named if name.startswith("./"))
    published = [port for s in COMPOSE["services"].values() for port in s.get("ports", [])]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_prometheus_asks_the_service_with_its_key() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in COMPOSE["services"]
    assert port == STAGES["cuda"].environment["SL_SERVE_PORT"]
    secret = Path(job["authorization"]["credentials_file"])
    assert COMPOSE["secrets"][secret.name] == {"environment": "SL_SERVE_API_KEY"}
    assert secret.name in COMPOSE["services"]["prometheus"]["secrets"]


def test_the_dashboard_shows_metrics_that_exist(engine: FakeEngine, tmp_path: Path) -> None:
    running = create_app(engine, replace(SETTINGS, jobs_dir=tmp_path))
    context = running.state.context
    context.metrics.answered("/v1/models", 200, 0.1)
    families = list(text_string_to_metric_families(context.metrics.render().decode()))
    labelled = {"host_to_device_bytes_total", "device_to_host_bytes_total"}  # no samples yet
    samples = {sample.name for family in families for sample in family.samples}
    samples |= {f"sl_serve_{name}" for name in labelled if name[:-6] in str(families)}
    context.close()
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 8
    shown = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    named = set(re.findall(r"\bsl_serve_\w+", shown))
    assert named - samples == set()


def test_the_unit_starts_and_stops_as_the_program_does() -> None:
    unit = RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read_string(UNIT)
    service = unit["Service"]
    program, command, *arguments = shlex.split(service["ExecStart"])
    assert program.endswith("/bin/sl-serve") and command == "serve"
    found = settings_of([*arguments, "org/name"])
    assert found.params["jobs_dir"].is_relative_to(f"/var/lib/{service['StateDirectory']}")
    drain_s = drain_timeout_s([*arguments, "org/name"])
    assert int(service["TimeoutStopSec"]) > drain_s + CLOSING_S
    assert service["LimitMEMLOCK"] == "infinity"
    assert f"```ini\n{UNIT}```" in TEXT


def check_docker_build(line: str) -> None:
    words = shlex.split(line)
    assert words[words.index("--target") + 1] in FINAL


def check_docker_run(line: str) -> None:
    words = shlex.split(line)
    assert int(words[words.index("--stop-timeout") + 1]) > drain_timeout_s(["org/name"]) + CLOSING_S
    given = [words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "-e"]
    assert {"SL_SERVE_MODEL", "SL_SERVE_API_KEY"} <= set(given) <= VARIABLES
    mounted = [words[i + 1].split(":")[1] for i, word in enumerate(words) if word == "-v"]
    assert mounted == json.loads(STAGES["cuda"].last("VOLUME"))
    assert words[-1] == "sl-serve:cuda"


def test_docker_lines() -> None:
    (build,) = re.findall(r"^docker build .*", TEXT, re.MULTILINE)
    check_docker_build(build)
    (run,) = re.findall(r"^docker run .*", TEXT, re.MULTILINE)
    check_docker_run(run)


def test_the_proxy_lets_uploads_and_streams_pass() -> None:
    (limit,) = re.findall(r"client_max_body_size (\d+)m;", TEXT)
    assert int(limit) * 2**20 > upload_limit_bytes()
    assert "proxy_buffering off;" in TEXT


def test_health_paths_exist(engine: FakeEngine) -> None:
    running = create_app(engine, SETTINGS)
    paths = {getattr(route, "path", "") for route in health_routes(running.state.context).routes}
    running.state.context.close()
    assert {"/live", "/ready", "/health"} <= paths
    for path in ("`/live`", "`/ready`", "`/health`"):
        assert path in TEXT


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links(target: str) -> None:
    assert (ROOT / "docs" / target).exists()
