"""Machines that are not at hand, for `sl-serve plan --profile` and for tests.

Sources. Cards: memory as the driver shows it, its nominal bandwidth, and peak dense 16-bit FLOP/s
with float32 sums, from NVIDIA's data sheets and architecture white papers. The share of the peak
is what large fp16 products reach in long runs, lower where a power limit holds the card back (T4
70 W, L4 72 W); device memory reads reach 0.85 of nominal. Links: what pinned copies achieve over
16 lanes, 11 to 13 GB/s for PCI Express 3.0, 24 to 26 for 4.0, about 55 for 5.0; with both
directions busy each keeps 0.8 of that (a 4090: 10.9 of 13.4 GB/s). Host memory and disk differ from
box to box: reads at half to two thirds of the nominal rate of the usual DIMMs, one data-centre NVMe
drive. So do the processors beside a card: 8 to 64 cores, 16 to 32 float32 FLOPs a cycle each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sl_serve.plan.hardware import AttentionRates, Hardware, MatmulRates, roofline

GB, GIB, TFLOPS = 10**9, 1 << 30, 10**12

BOTH_SHARE = 0.8  # of a direction's rate, while the other one is busy
UP_SHARE = 0.95  # of the rate down
DEVICE_READ_SHARE = 0.85
KNEE_ROWS = 64  # fewer rows leave part of a tile, and with it of the card, idle
GPU_CELL_OVERHEAD_S = 100e-6  # a dozen launches, queued from Python
CPU_CELL_OVERHEAD_S = 200e-6
GPU_ATTENTION_SHARE = 0.5  # of the products' rate
CPU_ATTENTION_SHARE, CPU_ATTENTION_READ_SHARE = 0.4, 0.6  # of the products' rate, of memory's
CPU_ELEMENTWISE_SHARE = 0.3  # of memory's


class _Card(NamedTuple):
    memory_gib: float
    memory_gb_per_s: float
    peak_tflops: float
    efficiency: float


class _Box(NamedTuple):
    host_gib: float
    host_gb_per_s: float
    disk_gb: float
    disk_gb_per_s: float
    link_gb_per_s: float
    gflops: float  # of all cores, float32


# A small cloud instance, a workstation, servers of the DDR4 and of the DDR5 generation.
CLOUD3 = _Box(64, 40, 400, 1.0, 12.3, 400)
CLOUD4_X8 = _Box(64, 50, 400, 1.0, 13.0, 500)  # cloud instances give the A10G eight lanes
CLOUD4 = _Box(64, 50, 400, 1.0, 25.0, 500)
WORKSTATION4 = _Box(128, 55, 2000, 6.0, 25.0, 1000)
SERVER4 = _Box(512, 150, 4000, 6.0, 25.0, 2000)
SERVER5 = _Box(1024, 300, 8000, 12.0, 55.0, 4000)


def _gpu(name: str, card: _Card, box: _Box) -> Hardware:
    link = box.link_gb_per_s * GB
    read = DEVICE_READ_SHARE * card.memory_gb_per_s * GB
    matmul = roofline(card.peak_tflops * TFLOPS, card.efficiency, KNEE_ROWS)
    return Hardware(
        name=name,
        device_bytes=int(card.memory_gib * GIB),
        host_bytes=int(box.host_gib * GIB),
        disk_bytes=int(box.disk_gb * GB),
        link_down_bytes_per_s=link,
        link_up_bytes_per_s=UP_SHARE * link,
        link_down_both_bytes_per_s=BOTH_SHARE * link,
        link_up_both_bytes_per_s=BOTH_SHARE * UP_SHARE * link,
        host_read_bytes_per_s=box.host_gb_per_s * GB,
        disk_read_bytes_per_s=box.disk_gb_per_s * GB,
        device_read_bytes_per_s=read,
        matmul=matmul,
        head=matmul,
        attention=AttentionRates(read, GPU_ATTENTION_SHARE * matmul.peak_flops_per_s),
        elementwise_bytes_per_s=read / 2,  # each byte is written and read
        cell_overhead_s=GPU_CELL_OVERHEAD_S,
        host_attention=_cpu_attention(box.host_gb_per_s, box.gflops),
    )


def _cpu_attention(host_gb_per_s: float, gflops: float) -> AttentionRates:
    return AttentionRates(
        CPU_ATTENTION_READ_SHARE * host_gb_per_s * GB, CPU_ATTENTION_SHARE * gflops * GB
    )


def _cpu(name: str, host_gib: float, host_gb_per_s: float, gflops: float) -> Hardware:
    """float32 products by rows, attention and the rest as our own kernels' on Zen 3, scaled to the
    processor's peak and its memory."""
    shares = ((1, 0.1), (16, 0.55), (64, 0.85), (256, 0.97), (1024, 1.0))
    matmul = MatmulRates(tuple((rows, share * gflops * GB) for rows, share in shares))
    return Hardware(
        name=name,
        device_bytes=0,
        host_bytes=int(host_gib * GIB),
        disk_bytes=500 * GB,
        link_down_bytes_per_s=0.0,
        link_up_bytes_per_s=0.0,
        link_down_both_bytes_per_s=0.0,
        link_up_both_bytes_per_s=0.0,
        host_read_bytes_per_s=host_gb_per_s * GB,
        disk_read_bytes_per_s=2.5 * GB,  # an NVMe drive of PCI Express 3.0
        device_read_bytes_per_s=0.0,
        matmul=matmul,
        head=matmul,
        attention=_cpu_attention(host_gb_per_s, gflops),
        elementwise_bytes_per_s=CPU_ELEMENTWISE_SHARE * host_gb_per_s * GB,
        cell_overhead_s=CPU_CELL_OVERHEAD_S,
    )


_ALL = (
    _gpu("t4", _Card(14.7, 320, 65, 0.33), CLOUD3),
    _gpu("a10g", _Card(22.0, 600, 70, 0.75), CLOUD4_X8),
    _gpu("l4", _Card(22.0, 300, 121, 0.45), CLOUD4),
    _gpu("rtx3090", _Card(23.6, 936, 71, 0.85), WORKSTATION4),
    _gpu("rtx4090", _Card(23.5, 1008, 165, 0.85), WORKSTATION4),
    _gpu("a100-40g", _Card(39.4, 1555, 312, 0.75), SERVER4),
    _gpu("a100-80g", _Card(79.2, 1935, 312, 0.75), SERVER4),
    _gpu("h100", _Card(79.2, 3350, 989, 0.65), SERVER5),
    _gpu("h200", _Card(139.8, 4800, 989, 0.65), SERVER5),
    _gpu("b200", _Card(178.0, 8000, 2250, 0.65), SERVER5),
    # The machine of FlexGen's figures (arXiv 2303.06865, section 6): 16 GB T4, 208 GB DRAM, 1.5 TB
    # SSD at about 2 GB/s read. Copies down at 12.89 GiB/s and products at 21.24 TFLOP/s are the
    # constants its authors fitted for it in their cost model; DRAM: cloud instances of that size.
    _gpu("t4-flexgen", _Card(15.0, 320, 21.24, 1.0), _Box(208, 60, 1500, 2.0, 13.84, 800)),
    # Two channels of DDR4-3200 and four AVX2 cores; two of DDR5-5600 and eight.
    _cpu("laptop", 16, 30, 250),
    _cpu("desktop", 64, 55, 600),
)

PROFILES: Mapping[str, Hardware] = {hardware.name: hardware for hardware in _ALL}
