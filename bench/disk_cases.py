"""What is run from disk: few requests and many, under a ceiling on host memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from bench.cases import Case, disk_case

FEW_REQUESTS = (1, 4)  # reading takes nearly all of a step
MANY_REQUESTS = 32  # and is hidden behind the prefill's arithmetic here
WARM_UP_REQUESTS, WARM_UP_TOKENS = 4, 2


@dataclass(frozen=True, slots=True)
class DiskStep:
    """One pass through the layers, by either system."""

    wall_s: float
    n_prefill_tokens: int
    n_decode_tokens: int
    read_bytes: int  # that the process had the storage deliver, by the kernel's count


def disk_case_of(
    model: Path,
    n_requests: int,
    host_memory_bytes: int,
    weights: str = "auto",
    disk_dir: Path | None = None,
) -> Case:
    """With the model, the ceiling and the weights that were asked for. `disk_dir`: for weights that
    the model's own files do not have."""
    from bench.bound import read_model_config

    case = disk_case(n_requests)
    return replace(
        case,
        model=model.name,
        token_ids=(3, read_model_config(model).vocab_size),
        engine=replace(
            case.engine,
            host_memory_bytes=host_memory_bytes,
            weights=weights,
            disk_dir=None if disk_dir is None else str(disk_dir),
        ),
    )


class StoredBytes(NamedTuple):
    """Of a checkpoint whose layers are alike."""

    n_layers: int
    layer: int
    head: int


def stored_bytes(model: Path) -> StoredBytes:
    from sl_serve.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    try:
        places = {name: checkpoint.location(name) for name in checkpoint.names()}
        sizes = {name: place.size_bytes for name, place in places.items() if place is not None}
        layers = sum(size for name, size in sizes.items() if ".layers." in name)
        n_layers = checkpoint.config.n_layers
        return StoredBytes(n_layers, layers // n_layers, sizes.get("lm_head.weight", 0))
    finally:
        checkpoint.close()
