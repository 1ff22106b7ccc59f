"""The native core under AddressSanitizer and UndefinedBehaviorSanitizer, through its tests.

Usage: scripts/prove sanitizers [PYTEST ARGUMENTS]

Builds the core with GCC's sanitizers into a temporary folder, some minutes, and runs the tests
that use it with that build in place of the installed one. A report ends the run: exit code 0 means
that there was none. Before, the same build must report a read past an array's end made on purpose.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = "sl_serve._native"
COMPILER = "g++"
OPTIMISATION = "-O1"  # with -O3 the instrumented kernels take half an hour to compile
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
TESTS = (
    "tests/engine/test_ops.py",
    "tests/engine/test_kv_formats.py",
    "tests/engine/test_matmul.py",
    "tests/engine/test_block_matmul.py",
    "tests/engine/test_group_matmul.py",
    "tests/engine/test_rounded_matmul.py",
    "tests/engine/test_same_order.py",
    "tests/weights/test_readers.py",
    "tests/weights/test_disk_ring.py",
    "tests/engine/test_engine.py",
    "tests/engine/test_invariants.py",
)
OPTIONS = {
    # The interpreter and torch keep memory until the process ends.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "PYTHONMALLOC": "malloc",  # every object by itself, so that its ends are watched
}


def main(arguments: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        core = build(Path(folder))
        environment = os.environ | OPTIONS | {"LD_PRELOAD": runtimes()}
        overrun = run("overrun", core, [], environment, capture_output=True)
        if b"heap-buffer-overflow" not in overrun.stderr:
            print(overrun.stderr.decode(errors="replace"), file=sys.stderr)
            print("sanitizers: a read past an array's end went unnoticed", file=sys.stderr)
            return 1
        print("sanitizers: a read past an array's end is noticed; now the tests", flush=True)
        code = run("test", core, arguments or TESTS, environment).returncode
        print(f"sanitizers: {'no report' if code == 0 else f'exit code {code}'}")
        return code


def build(folder: Path) -> Path:
    """The core as an extension module, made as an installation does but for the flags."""
    print("sanitizers: building", flush=True)
    settings = [f"cmake.define.CMAKE_CXX_FLAGS={FLAGS}", "cmake.build-type=None"]
    settings.append(f"cmake.define.SL_OPTIMISATION={OPTIMISATION}")
    settings.append(f"build-dir={folder / 'build'}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = [part for setting in settings for part in ("-C", setting)]
    subprocess.run(
        [*pip, "--no-deps", "--target", str(folder / "site"), *options, str(ROOT)],
        env=os.environ | {"CXX": COMPILER},
        check=True,
    )
    (core,) = (folder / "site" / "sl_serve").glob("_native*.so")
    return core


def runtimes() -> str:
    """Loaded before the interpreter: it is not built with the sanitizer, whose functions must come
    first, and which looks for the C++ library's exceptions as it starts."""
    found = [
        subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return " ".join(found)


def run(
    role: str, core: Path, arguments: Sequence[str], environment: dict[str, str], **options: bool
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, __file__, role, str(core), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, **options)


def load(core: Path) -> ModuleType:
    """In place of the installed core, for every import that follows."""
    spec = importlib.util.spec_from_file_location(CORE, core)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[CORE] = module
    spec.loader.exec_module(module)
    return module


def overrun(core: Path) -> None:
    native = load(core)
    values, out = np.zeros(30, np.float32), np.zeros(64, np.float32)
    native.Core("portable", 1).silu_mul(values.ctypes.data, out.ctypes.data, 1, 16)


def run_tests(core: Path, arguments: Sequence[str]) -> int:
    load(core)
    from sl_serve import _native

    assert _native.__file__ == str(core)
    return pytest.main(["-q", "-p", "no:cacheprovider", *arguments])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["overrun", core]:
            overrun(Path(core))
        case ["test", core, *arguments]:
            sys.exit(run_tests(Path(core), arguments))
        case arguments:
            sys.exit(main(arguments))
