"""The Dockerfile, read far enough for its own steps to be checked and repeated."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]

    @property
    def environment(self) -> dict[str, str]:
        parts = [part for value in self.all("ENV") for part in shlex.split(value)]
        return dict(part.split("=", 1) for part in parts)


def stages(text: str) -> dict[str, Stage]:
    """By name; a stage begins with the steps of the one it is made from."""
    found: dict[str, Stage] = {}
    for instruction, value in instructions(text):
        if instruction == "FROM":
            base, _, name = re.split(r"\s+(AS)\s+", value)
            inherited = found[base].steps if base in found else []
            stage = found[name] = Stage(name, base, [*inherited])
        elif found:
            stage.steps.append((instruction, value))
    return found


def instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def health_command(stage: Stage) -> list[str]:
    command: Any = json.loads(stage.last("HEALTHCHECK").split("CMD", 1)[1])
    assert isinstance(command, list)
    return command


def start_command(stage: Stage) -> list[str]:
    return [*json.loads(stage.last("ENTRYPOINT")), *json.loads(stage.last("CMD"))]


STAGES = stages((ROOT / "Dockerfile").read_text())
