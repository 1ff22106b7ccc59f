"""Layers, embedding and head on disk: the same tokens, exact counts, clear ends."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sl_serve import loader, stored_model
from sl_serve.config import EngineConfig, SchedulerConfig
from sl_serve.core import FinishReason
from sl_serve.device import SimDevice
from sl_serve.errors import EngineDeadError, MemoryBudgetError, UserError
from sl_serve.loader import Parts
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights import tiers
from sl_serve.weights.checkpoint import open_checkpoint
from tests.engine.running import (
    GREEDY,
    KV_BYTES,
    config,
    engine,
    one_by_one,
    random_prompts,
    requests_for,
    run,
    steps_of,
)
from tests.models import TINY_MODELS

PROMPTS = random_prompts(6, longest=40, seed=9)
N_LAYERS = 3
Force = Callable[..., None]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return one_by_one(folder, PROMPTS)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> Force:
    """Tiny models fit into any memory: the plan is told to leave layers on disk."""

    def force(n_layers: int, *, vocabulary: bool = False) -> None:
        def planned(*args: object) -> MemoryPlan:
            plan = plan_memory(*args)  # type: ignore[arg-type]
            return replace(
                plan,
                n_disk_layers=n_layers,
                embedding_on_disk=vocabulary,
                head_on_disk=vocabulary,
            )

        monkeypatch.setattr(stored_model, "plan_memory", planned)

    return force


@pytest.mark.parametrize("vocabulary", [False, True])
@pytest.mark.parametrize("look_ahead", [0, 1, 3])
@pytest.mark.parametrize("n_disk_layers", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_tokens_are_those_of_everything_resident(
    folder: Path,
    expected: list[list[int]],
    on_disk: Force,
    device: str,
    n_disk_layers: int,
    look_ahead: int,
    vocabulary: bool,
) -> None:
    on_disk(n_disk_layers, vocabulary=vocabulary)
    settings = config(max_rows=6, n_sub_batches=2, look_ahead=look_ahead, prefill_chunk_tokens=48)
    found: list[Parts] = []
    simulated = SimDevice() if device == "sim" else None
    with engine(folder, settings, simulated, found.append) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS) == expected
        layout = found[0].store.layout
        content_bytes = sum(s.size_bytes for s in layout.segments(0))
        acquired = found[0].sweep.weights.n_bytes_moved // layout.image_bytes
        ahead = 0 if device == "cpu" else look_ahead  # queued on the device beyond the last step
        assert acquired == N_LAYERS * len(steps)
        on_disk_acquired = sum(
            (unit % N_LAYERS) in tiers.spread(N_LAYERS, n_disk_layers)
            for unit in range(acquired + ahead)
        )
        read = found[0].store.n_disk_bytes_read
        if device == "cpu":
            assert read == on_disk_acquired * content_bytes
        else:
            assert read <= on_disk_acquired * content_bytes


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_layers_that_files_do_not_hold_are_spooled(
    tmp_path: Path, on_disk: Force, device: str
) -> None:
    """A float32 engine over a half-precision checkpoint on sim; on cpu, over mixed types."""
    folder, spool = tmp_path / "model", tmp_path / "spool"
    spool.mkdir()
    TINY_MODELS["llama"](folder, torch_dtype=torch.float32)
    shrink(folder, every=1 if device == "sim" else 2)
    with engine(folder, config(max_rows=6), SimDevice() if device == "sim" else None) as running:
        expected = run(running, PROMPTS)
    on_disk(2)
    settings = replace(config(max_rows=6), disk_dir=str(spool))
    with engine(folder, settings, SimDevice() if device == "sim" else None) as running:
        assert list(spool.iterdir()) == [], "the file has no name while it is used"
        assert run(running, PROMPTS) == expected


def shrink(folder: Path, every: int) -> None:
    """Store each `every`th tensor of the folder in bfloat16."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    short = {n: t.bfloat16() if i % every == 0 else t for i, (n, t) in enumerate(tensors.items())}
    save_file(short, path, metadata={"format": "pt"})


def test_a_file_cut_short_while_running_ends_every_request_with_the_reason(
    tmp_path: Path, on_disk: Force
) -> None:
    TINY_MODELS["llama"](tmp_path)
    on_disk(2)
    with engine(tmp_path, config(max_rows=2)) as running:
        os.truncate(tmp_path / "model.safetensors", 4096)
        requests, answers = requests_for(PROMPTS[:2], GREEDY)
        running.submit(requests)
        answers.wait()
        for news in answers.news:
            assert news[-1].finish_reason is FinishReason.ERROR
            assert "cut short" in str(news[-1].error)
        with pytest.raises(EngineDeadError, match="cut short"):
            running.submit(requests_for(PROMPTS[:1], GREEDY)[0])


# Folders that cannot take the layers. Nothing half-written stays.


def spooling(folder: Path, spool: Path) -> None:
    settings = replace(config(max_rows=1), disk_dir=str(spool), device="sim")
    checkpoint = open_checkpoint(folder)
    try:
        loader.load(checkpoint, settings, device=SimDevice()).close()
    finally:
        checkpoint.close()


@pytest.fixture
def half(tmp_path: Path, on_disk: Force) -> Path:
    folder = tmp_path / "half"
    TINY_MODELS["llama"](folder)
    shrink(folder, every=1)
    on_disk(3)
    return folder


def test_a_folder_that_is_too_small_is_refused_with_the_numbers(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(UserError, match=r"needed for layers, 0 MiB are free"):
        spooling(half, tmp_path)


def test_a_folder_that_fills_up_is_refused_and_left_clean(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left"):
        spooling(half, spool)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left"):
        spooling(half, spool)
    assert list(spool.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(half: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--disk-dir .*none"):
        spooling(half, tmp_path / "none")


def test_without_a_folder_the_way_out_is_named(half: Path) -> None:
    settings = replace(config(max_rows=1), device="sim")
    checkpoint = open_checkpoint(half)
    with pytest.raises(MemoryBudgetError, match="give --disk-dir a folder with"):
        loader.load(checkpoint, settings, device=SimDevice())
    checkpoint.close()


# The plan.


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """Large enough that the ring of the disk tier is smaller than the model."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12}
    TINY_MODELS["llama"](tmp_path, **sizes, vocab_size=4000)
    return tmp_path


@pytest.mark.parametrize("available_mb", [60, 70, 90, 110, 130, 180])
def test_layers_beyond_the_budget_stay_on_disk(
    big: Path, monkeypatch: pytest.MonkeyPatch, available_mb: int
) -> None:
    monkeypatch.setattr(stored_model, "host_budget_bytes", lambda _: available_mb * 10**6)
    settings = EngineConfig(
        kv_memory_bytes=KV_BYTES, scheduler=SchedulerConfig(max_rows=4, prefill_chunk_tokens=16)
    )
    checkpoint = open_checkpoint(big)
    plan = plan_checkpoint(checkpoint, settings)
    assert plan.total_bytes <= available_mb * 10**6
    layer_bytes = (plan.weights_bytes + plan.disk_bytes) // 12
    assert plan.disk_bytes == plan.n_disk_layers * layer_bytes
    assert (plan.n_disk_layers > 0) == (available_mb < 180)
    if plan.n_disk_layers:
        assert plan.embedding_on_disk
        unused = available_mb * 10**6 * 0.92 - plan.total_bytes
        assert unused < layer_bytes, "another layer would have fitted"
    parts = loader.load(checkpoint, settings)
    assert len(parts.store.host_images) == 12 - plan.n_disk_layers
    parts.close()
    checkpoint.close()


def test_a_budget_below_the_minimum_is_refused_with_the_sum_and_a_way_out(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_model, "host_budget_bytes", lambda _: 30 * 10**6)
    checkpoint = open_checkpoint(big)
    with pytest.raises(MemoryBudgetError, match=r"raise --host-memory to \d+MiB"):
        plan_checkpoint(checkpoint, EngineConfig(host_memory_bytes=300 * 10**6))
    checkpoint.close()


def test_a_budget_above_what_is_there_is_refused() -> None:
    with pytest.raises(MemoryBudgetError, match=r"asks for 1048576\.0 GiB, .* are there"):
        stored_model.host_budget_bytes(1 << 50)
