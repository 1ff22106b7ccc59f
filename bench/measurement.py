"""What one run of one system yields, and the checks on it."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.errors import BenchError


@dataclass(frozen=True, slots=True)
class Measurement:
    """One full run of a case. `wall_s` spans all requests, prefill included, loading excluded."""

    load_s: float
    wall_s: float
    peak_rss_bytes: int  # of the whole process, loading and mapped files included
    output_ids: list[list[int]]
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def generated_tokens(self) -> int:
        return sum(map(len, self.output_ids))


def check_outputs(case: Case, output_ids: Sequence[Sequence[int]]) -> None:
    """Raises BenchError unless every request got exactly the tokens the case asks for."""
    if len(output_ids) != case.n_requests:
        raise BenchError(f"{len(output_ids)} requests were answered instead of {case.n_requests}")
    for index, ids in enumerate(output_ids):
        if len(ids) != case.output_tokens:
            raise BenchError(
                f"request {index} got {len(ids)} tokens instead of {case.output_tokens}"
            )


def peak_rss_bytes() -> int:
    """The most memory this process has had resident.

    Linux's VmHWM starts afresh with the program, whereas getrusage's figure would include the
    parent that started it.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
