"""A ten-layer model and a machine with round numbers, to be computed with by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from sl_serve.plan import probe, probe_compute
from sl_serve.plan.hardware import AttentionRates, Hardware, MatmulRates
from sl_serve.plan.model_sizes import LinearBytes, ModelSizes
from sl_serve.plan.placement import Placement, Workload

MB, GB, MIB = 10**6, 10**9, 1 << 20


def model(**changes: Any) -> ModelSizes:
    """Layers of 100 MB and 1 GFLOP per token; 20,000 bytes of KV per token over all layers."""
    settings: dict[str, Any] = {
        "name": "ten",
        "n_layers": 10,
        "layer_bytes": 100 * MB,
        "head_bytes": 0,
        "static_bytes": 50 * MB,
        "layer_flops_per_token": 1e9,
        "head_flops_per_token": 0.0,
        "hidden_size": 1000,
        "q_size": 1000,
        "kv_size": 500,
        "vocab_size": 1000,
        "max_positions": 100_000,
        "itemsize": 2,
        "activations": LinearBytes(10_000.0),
    }
    return ModelSizes(**settings | changes)


def hardware(**changes: Any) -> Hardware:
    """1 GB/s down and up, in both directions at once 0.5; the rest is in nobody's way."""
    settings: dict[str, Any] = {
        "name": "round",
        "device_bytes": 1 * GB,
        "host_bytes": 10 * GB,
        "disk_bytes": 100 * GB,
        "link_down_bytes_per_s": 1e9,
        "link_up_bytes_per_s": 1e9,
        "link_down_both_bytes_per_s": 0.5e9,
        "link_up_both_bytes_per_s": 0.5e9,
        "host_read_bytes_per_s": 1e12,
        "disk_read_bytes_per_s": 0.25e9,
        "device_read_bytes_per_s": 1e15,
        "matmul": MatmulRates(((1, 1e11),)),
        "elementwise_bytes_per_s": 1e18,
    }
    settings |= changes
    matmul = settings["matmul"]
    read = settings["device_read_bytes_per_s"] or settings["host_read_bytes_per_s"]
    attention = AttentionRates(read, matmul.peak_flops_per_s)
    return Hardware(**{"head": matmul, "attention": attention} | settings)


def processor(**changes: Any) -> Hardware:
    """No device: 10 GB/s of host memory."""
    nothing = dict.fromkeys(
        (
            "device_bytes",
            "link_down_bytes_per_s",
            "link_up_bytes_per_s",
            "link_down_both_bytes_per_s",
            "link_up_both_bytes_per_s",
            "device_read_bytes_per_s",
        ),
        0,
    )
    return hardware(
        **nothing
        | {
            "host_read_bytes_per_s": 10e9,
            "attention": AttentionRates(10e9, 1e15),
        }
        | changes
    )


def placement(**changes: Any) -> Placement:
    """All layers in host memory, KV on the device."""
    settings: dict[str, Any] = {
        "n_device_layers": 0,
        "n_host_layers": 10,
        "n_disk_layers": 0,
        "rows": 4,
        "n_sub_batches": 1,
        "prefill_tokens": 100,
        "kv_device_share": 1.0,
    }
    return Placement(**settings | changes)


WORKLOADS = st.builds(
    Workload,
    prompt_tokens=st.integers(1, 3000),
    output_tokens=st.integers(1, 300),
    n_requests=st.integers(1, 12),
)
_RATES = st.sampled_from([1e8, 1e9, 3e10, 1e12])


def machines() -> st.SearchStrategy[Hardware]:
    return st.one_of(
        st.builds(
            lambda link, host, disk, read, flops, device, memory: hardware(
                link_down_bytes_per_s=link,
                link_up_bytes_per_s=0.9 * link,
                link_down_both_bytes_per_s=0.8 * link,
                link_up_both_bytes_per_s=0.7 * link,
                host_read_bytes_per_s=host,
                disk_read_bytes_per_s=disk,
                device_read_bytes_per_s=read,
                matmul=MatmulRates(((4, flops), (100, 3 * flops))),
                device_bytes=device * MB,
                host_bytes=memory * MB,
            ),
            *[_RATES] * 4,
            st.sampled_from([1e10, 1e13]),
            st.sampled_from([20, 200, 500, 2000]),
            st.sampled_from([50, 500, 1500, 5000]),
        ),
        st.builds(
            lambda host, disk, memory: processor(
                host_read_bytes_per_s=host, disk_read_bytes_per_s=disk, host_bytes=memory * MB
            ),
            _RATES,
            _RATES,
            st.sampled_from([50, 500, 1500, 5000]),
        ),
    )


def shorten_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that only look at whether and what is measured."""
    monkeypatch.setattr(probe_compute, "SWEEP_BYTES", 2 * MIB)
    monkeypatch.setattr(probe, "HOST_BUFFER_BYTES", 4 * MIB)
    monkeypatch.setattr(probe, "DISK_FILE_BYTES", 17 * MIB)
    monkeypatch.setattr(probe_compute, "MEASURED_SECONDS", 0.001)
    monkeypatch.setattr(probe_compute, "MATMUL_ROWS", (1, 8))
    monkeypatch.setattr(probe_compute, "HEAD_ROWS", (1, 2))
    monkeypatch.setattr(probe_compute, "ELEMENTWISE_TOKENS", 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
