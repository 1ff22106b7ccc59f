"""Attention where the KV lies: by the processor, beside a device that computes the rest.

Queries, keys and values of new tokens go up, what attention gives comes down; the KV itself never
crosses the link.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from sl_serve.core import SubBatchPlan
from sl_serve.device import Device, Event, HostWork, Stream
from sl_serve.kv.host import HostKV
from sl_serve.kv.pool import Slab
from sl_serve.kv.rows import RowTable
from sl_serve.ops import CAUSAL, Ops, Scoring

HOST_DTYPE = torch.float32  # of what is computed with here, whatever KV is stored as


class _SubBatch(NamedTuple):
    tokens: slice  # of the step's, in every buffer
    table: RowTable
    context_bytes: int  # K and V that one layer reads


class _Job(NamedTuple):
    arrived: Event  # of queries, keys and values
    done: Future[HostWork]


class HostAttention:
    """One worker thread, and room for the new tokens of a step, once on each side of the link.

    Order. A cell's q, k and v are packed into the sub-batch's part of the device's buffer and go
    up on the store stream; the worker waits for them, appends and attends, cell by cell; when it is
    done the results come down on the load stream, and compute waits for them. A sub-batch has one
    cell under way, so its parts of all four buffers are free when the next one starts: that is
    after `finish`, which comes after the worker is done with the last.

    The engine's thread alone queues work on the device; the worker only waits for events.
    """

    def __init__(
        self,
        device: Device,
        ops: Ops,
        host: HostKV,
        dtype: torch.dtype,
        n_heads: int,
        max_tokens: int,
        is_beside: bool,
    ) -> None:
        """`ops`: the processor's. `dtype`: the device's. `max_tokens`: of a step. `is_beside`:
        other cells may run while one is attended to."""
        spec = host.spec
        assert ops.dtype == HOST_DTYPE
        self._device, self._ops, self._host = device, ops, host
        self._n_kv_heads, self._is_beside = spec.n_kv_heads, is_beside
        heads = [n_heads, spec.n_kv_heads, spec.n_kv_heads]
        qkv, out = (max_tokens, sum(heads), spec.head_dim), (max_tokens, n_heads * spec.head_dim)
        self._heads = heads
        self._device_qkv = _tensor(device.empty, qkv, dtype)
        self._host_qkv = _tensor(device.host_empty, qkv, dtype)
        self._device_out = _tensor(device.empty, out, dtype)
        self._host_out = _tensor(device.host_empty, out, dtype)
        # One cell is attended to at a time; the results are converted as they are copied.
        self._widened = None if dtype == HOST_DTYPE else torch.empty(qkv, dtype=HOST_DTYPE)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="host-attention")
        self._sub_batches: list[_SubBatch] = []
        self._jobs: dict[int, _Job] = {}  # by sub-batch
        self._scorings: dict[int, Scoring] = {}  # by layer, once seen
        self.n_bytes_down = 0
        self.n_bytes_up = 0

    def begin(self, sub_batches: Sequence[SubBatchPlan], slabs: Mapping[int, Slab]) -> list[bool]:
        self._sub_batches, n = [], 0
        for plan in sub_batches:
            n_context = sum(w.stop for w in plan.rows)
            self._sub_batches.append(
                _SubBatch(
                    slice(n, n + plan.n_tokens),
                    self._host.table(plan, slabs),
                    n_context * self._host.spec.token_layer_bytes,
                )
            )
            n += plan.n_tokens
        return [self._is_beside] * len(sub_batches)

    def start(
        self,
        cell: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scoring: Scoring = CAUSAL,
    ) -> None:
        layer, index = divmod(cell, len(self._sub_batches))
        sub_batch = self._sub_batches[index]
        packed, arriving = self._device_qkv[sub_batch.tokens], self._host_qkv[sub_batch.tokens]
        torch.cat((q, k, v), dim=1, out=packed)
        self._device.wait(Stream.STORE, self._device.record(Stream.COMPUTE))
        self._device.copy(Stream.STORE, _bytes_of(arriving), _bytes_of(packed), "queries, new KV")
        self.n_bytes_up += packed.nbytes
        arrived = self._device.record(Stream.STORE)
        done = self._worker.submit(
            self._attend, arrived, layer, sub_batch, self._on_host(layer, scoring)
        )
        self._jobs[index] = _Job(arrived, done)

    def finish(self, cell: int) -> torch.Tensor:
        """Raises what the worker raised."""
        index = cell % len(self._sub_batches)
        sub_batch, job = self._sub_batches[index], self._jobs.pop(index)
        device, work = self._device, job.done.result()
        attended = device.host_read(job.arrived, sub_batch.context_bytes, work, "attention")
        device.wait(Stream.LOAD, attended)
        arriving, given = self._device_out[sub_batch.tokens], self._host_out[sub_batch.tokens]
        device.copy(Stream.LOAD, _bytes_of(arriving), _bytes_of(given), "attention")
        self.n_bytes_down += arriving.nbytes
        device.wait(Stream.COMPUTE, device.record(Stream.LOAD))
        return arriving

    def restart(self) -> None:
        wait([job.done for job in self._jobs.values()])
        self._jobs.clear()

    def close(self) -> None:
        """Waits for the worker; what it has not begun is dropped."""
        self._worker.shutdown(cancel_futures=True)

    def _on_host(self, layer: int, scoring: Scoring) -> Scoring:
        """Its numbers are the layer's own, the same in every step."""
        if layer not in self._scorings:
            self._scorings[layer] = scoring.to(torch.device("cpu"))
        return self._scorings[layer]

    def _attend(
        self, arrived: Event, layer: int, sub_batch: _SubBatch, scoring: Scoring
    ) -> HostWork:
        """On the worker's thread, whose mode is its own."""
        with torch.inference_mode():
            self._device.synchronize(arrived)
            start_s = time.perf_counter()
            new = self._host_qkv[sub_batch.tokens]
            if self._widened is not None:
                new = self._widened[: len(new)].copy_(new)
            q, k, v = torch.split_with_sizes(new, self._heads, dim=1)
            region = self._host.region(layer)
            self._ops.append(region, sub_batch.table, k, v)
            attended = self._ops.attend(region, sub_batch.table, q, self._n_kv_heads, scoring)
            self._host_out[sub_batch.tokens].copy_(attended)
        return HostWork(start_s, time.perf_counter())


def _tensor(
    allocate: Callable[[int], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
