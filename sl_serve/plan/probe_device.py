"""The link and the accelerator, measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from sl_serve.config import ModelConfig
from sl_serve.plan.budget import GIB, MIB
from sl_serve.plan.hardware import AttentionRates, Hardware, MatmulRates
from sl_serve.plan.probe_compute import products_of
from sl_serve.plan.profiles import GPU_ATTENTION_SHARE

LINK_BYTES = 256 * MIB
DEVICE_BUFFER_BYTES = GIB
ROUNDS = 8
MATMUL_ROWS = (16, 64, 256, 1024, 4096)


def probe_device(
    model: ModelConfig,
    stored: torch.dtype,
    *,
    host_bytes: int,
    disk_bytes: int,
    host_read_bytes_per_s: float,
    disk_read_bytes_per_s: float,
    host_attention: AttentionRates,
) -> Hardware:
    """The first accelerator, beside what is known of the host."""
    device_bytes, _ = torch.cuda.mem_get_info()
    link = _Link()
    with torch.inference_mode():
        read, matmul = _device_read_bytes_per_s(), _matmul_rates(model, stored)
        down, up = link.rates(down=True, up=False)[0], link.rates(down=False, up=True)[1]
        down_both, up_both = link.rates(down=True, up=True)
        return Hardware(
            name=torch.cuda.get_device_name(),
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
            link_down_bytes_per_s=down,
            link_up_bytes_per_s=up,
            link_down_both_bytes_per_s=min(down, down_both),
            link_up_both_bytes_per_s=min(up, up_both),
            host_read_bytes_per_s=host_read_bytes_per_s,
            disk_read_bytes_per_s=disk_read_bytes_per_s,
            device_read_bytes_per_s=read,
            matmul=matmul,
            head=matmul,
            attention=AttentionRates(read, GPU_ATTENTION_SHARE * matmul.peak_flops_per_s),
            elementwise_bytes_per_s=read / 2,
            cell_overhead_s=_launch_overhead_s(),
            host_attention=host_attention,
        )


def link_down_bytes_per_s() -> float:
    return _Link().rates(down=True, up=False)[0]


class _Link:
    """Pinned copies in both directions, on a stream each."""

    def __init__(self) -> None:
        self._streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._host = [torch.ones(LINK_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2)]
        self._device = [torch.ones(LINK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def rates(self, *, down: bool, up: bool) -> tuple[float, float]:
        """Bytes/s down and up while `down` and `up` are copied at once; 0 for what is not."""
        copies = [(self._device[0], self._host[0])] * down, [(self._host[1], self._device[1])] * up
        events = []
        for stream, wanted in zip(self._streams, copies, strict=True):
            begin, end = _mark(), _mark()
            with torch.cuda.stream(stream):
                for dst, src in wanted:  # the first copy wakes the link up
                    dst.copy_(src, non_blocking=True)
                begin.record()
                for dst, src in wanted * ROUNDS:
                    dst.copy_(src, non_blocking=True)
                end.record()
            events.append((begin, end))
        for _, end in events:
            end.synchronize()
        n_bytes = ROUNDS * LINK_BYTES
        seconds = [max(begin.elapsed_time(end) / 1e3, 1e-9) for begin, end in events]
        return n_bytes * down / seconds[0], n_bytes * up / seconds[1]


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _device_read_bytes_per_s() -> float:
    values = torch.ones(DEVICE_BUFFER_BYTES // 4, device="cuda")
    return values.nbytes / _seconds(values.sum)


def _matmul_rates(model: ModelConfig, dtype: torch.dtype) -> MatmulRates:
    params = products_of(model)
    weights = [torch.ones(*reversed(p.shape), dtype=dtype, device="cuda").t() for p in params]

    def rate(rows: int) -> float:
        inputs = [torch.ones(rows, len(w), dtype=dtype, device="cuda") for w in weights]

        def layer() -> None:
            for x, w in zip(inputs, weights, strict=True):
                torch.mm(x, w)

        return 2.0 * rows * sum(w.numel() for w in weights) / _seconds(layer)

    return MatmulRates(tuple((rows, rate(rows)) for rows in MATMUL_ROWS))


def _launch_overhead_s() -> float:
    """Of a cell: a dozen operations on next to nothing."""
    x = torch.ones(2, 16, device="cuda")
    return 12 * _seconds(lambda: x.add_(1.0))


def _seconds(act: Callable[[], object]) -> float:
    """Of one call, queued one after another, the accelerator idle before and after."""
    act()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        act()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / ROUNDS
