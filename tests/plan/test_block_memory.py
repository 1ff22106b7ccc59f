"""What is planned for a layer's pass against what real operations make, of every family."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from sl_serve.config import EngineConfig, ModelConfig
from sl_serve.models import supported_families
from sl_serve.plan.activations import PROBE_TOKENS
from sl_serve.plan.block_memory import block_memory
from tests.families.harness import Tiny
from tests.families.settings import config_of
from tests.plan.made_by_blocks import check_planned

CONFIGS = {
    "native": EngineConfig(),
    "twins": EngineConfig(native=False),
    "device": EngineConfig(device="sim"),
}
N_TOKENS = 1000


def tiny_of(family: str) -> Tiny:
    found = importlib.import_module(f"tests.families.test_{family}").TINY
    assert isinstance(found, Tiny)
    return found


CASES = [
    (family, name, kind)
    for family in supported_families()
    if family != "gemma3"  # its layers are those of gemma3_text
    for name in tiny_of(family).names
    for kind in (CONFIGS if not name else ["native"])
]


def settings(family: str, variant: str) -> ModelConfig:
    tiny = tiny_of(family)
    changes = tiny.variants[variant] if variant else {}
    return config_of(Tiny(tiny.config, tiny.model, {**tiny.settings, **changes}))


@pytest.mark.parametrize(("family", "variant", "kind"), CASES)
def test_no_layer_makes_more_than_is_planned(family: str, variant: str, kind: str) -> None:
    assert N_TOKENS not in PROBE_TOKENS
    check_planned(settings(family, variant), CONFIGS[kind], N_TOKENS)


@pytest.mark.parametrize("native", [True, False])
def test_rounded_activations_are_planned_for(native: bool) -> None:
    """Where all matrices are in blocks; the twin's copies, too."""
    config = EngineConfig(activations="int8", native=native)
    check_planned(settings("llama", ""), config, N_TOKENS)
    plain = block_memory(settings("llama", ""), EngineConfig(native=native))
    planned = block_memory(settings("llama", ""), config)
    assert planned.computed.per_token > plain.computed.per_token


def test_without_experts_none_are_planned_for() -> None:
    planned = block_memory(settings("llama", ""), CONFIGS["native"])
    assert planned.expert.at(N_TOKENS) == 0


BY_ITSELF = """
import pickle, sys
from sl_serve.config import EngineConfig
from sl_serve.plan.block_memory import block_memory
block_memory(pickle.load(open(sys.argv[1], "rb")), EngineConfig())
print(sorted({"sympy", "torch._dynamo"} & set(sys.modules)))
"""


def test_measuring_does_not_import_torchs_compiler(tmp_path: Path) -> None:
    """That takes two seconds of every start."""
    model = tmp_path / "model"
    model.write_bytes(pickle.dumps(settings("llama", "")))
    command = [sys.executable, "-c", BY_ITSELF, str(model)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
