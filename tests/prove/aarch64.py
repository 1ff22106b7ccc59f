"""The native core compiles for 64-bit ARM.

Usage: scripts/prove aarch64

Fetches a cross compiler (the package ziglang, 80 MB) into a temporary folder and compiles the files
that an installation on that processor compiles. Nothing is linked or run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = ("kernels_portable.cpp", "parallel.cpp", "reader.cpp", "bindings.cpp")
PACKAGES = ("ziglang>=0.13", "nanobind>=2.4")
TARGET = "aarch64-linux-gnu"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Werror")
MACHINE_OFFSET, AARCH64 = 18, 183  # e_machine of an ELF header


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        compiler = Path(folder) / "compiler"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", str(compiler), *PACKAGES], check=True)
        headers = [compiler / "nanobind" / "include", Path(sysconfig.get_path("include"))]
        environment = os.environ | {"PYTHONPATH": str(compiler)}
        for source in SOURCES:
            compile_one(source, headers, Path(folder) / "object.o", environment)
            print(f"aarch64: {source} compiles", flush=True)
    return 0


def compile_one(
    source: str, headers: Sequence[Path], to: Path, environment: Mapping[str, str]
) -> None:
    """Raises CalledProcessError when it does not compile, AssertionError for another machine."""
    includes = [part for header in headers for part in ("-isystem", str(header))]
    command = [sys.executable, "-m", "ziglang", "c++", "-target", TARGET, *FLAGS, *includes]
    subprocess.run([*command, "-c", str(CSRC / source), "-o", str(to)], env=environment, check=True)
    header = to.read_bytes()[: MACHINE_OFFSET + 2]
    assert int.from_bytes(header[MACHINE_OFFSET:], "little") == AARCH64


if __name__ == "__main__":
    sys.exit(main())
