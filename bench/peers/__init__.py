"""Systems to compare with: one file each, named after what it is installed as.

A peer's file has two functions, both run in a process of their own: `probe` tries its settings
briefly and names those that deserve a full run, `measure` runs the case with one of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from bench.cases import Case
from bench.errors import BenchError
from bench.measurement import Measurement

# What the peer is imported as -> its file here.
PEERS: Mapping[str, str] = {"transformers": "bench.peers.hf"}


@dataclass(frozen=True, slots=True)
class Probe:
    """`variants` deserve a full run. `estimates`: tokens/s of each setting tried, extrapolated
    from a few steps at a short context, which flatters it; `skipped`: why others were not tried."""

    variants: list[str]
    estimates: dict[str, float]
    skipped: dict[str, str] = field(default_factory=dict)


class Peer(Protocol):
    def probe(self, case: Case, model: Path) -> Probe: ...

    def measure(self, case: Case, model: Path, variant: str) -> Measurement: ...


def is_installed(name: str) -> bool:
    """Raises BenchError for a peer nobody has written a file for."""
    if name not in PEERS:
        raise BenchError(f"no peer is named {name!r}; there are: {', '.join(PEERS)}")
    return importlib.util.find_spec(name) is not None


def load_peer(name: str) -> Peer:
    return cast(Peer, importlib.import_module(PEERS[name]))
