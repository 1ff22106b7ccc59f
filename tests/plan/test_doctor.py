"""Findings from invented facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sl_serve.plan.doctor import Facts, examine
from sl_serve.plan.facts import cgroup_limit_bytes, gather, huge_pages, parse_pcie
from tests.plan.examples import shorten_probes

GIB = 1 << 30
HEALTHY = Facts(
    total_bytes=64 * GIB,
    available_bytes=60 * GIB,
    swap_used_bytes=0,
    cgroup_limit_bytes=None,
    memlock_bytes=None,
    huge_pages="madvise",
    native_target="avx2",
    n_cores=8,
    n_machine_cores=8,
    n_threads=8,
    host_read_bytes_per_s=40e9,
    has_device=True,
    device_name="a card",
    link_bytes_per_s=25e9,
    pcie_generation=4,
    pcie_width=16,
    pcie_max_width=16,
    disk_dir="/data",
    disk_read_bytes_per_s=3e9,
    disk_free_bytes=500 * GIB,
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_probes(monkeypatch)


def test_nothing_is_wrong_with_a_healthy_machine() -> None:
    assert examine(HEALTHY) == []
    bare = replace(
        HEALTHY,
        has_device=False,
        device_name=None,
        link_bytes_per_s=None,
        pcie_generation=None,
        pcie_width=None,
        pcie_max_width=None,
        memlock_bytes=8 << 20,  # locks nothing without a device
        huge_pages=None,
        disk_dir=None,
        disk_read_bytes_per_s=None,
    )
    assert examine(bare) == []


@pytest.mark.parametrize(
    ("changes", "name", "numbers"),
    [
        # 16 lanes of 1.969 GB/s carry 31.5
        ({"link_bytes_per_s": 12e9}, "slow link", ["12.0 GB/s", "16 lanes", "31.5 GB/s"]),
        ({"pcie_width": 8, "link_bytes_per_s": 13e9}, "narrow link", ["8 of its 16"]),
        ({"memlock_bytes": 8 << 20}, "locked memory", ["8 MiB"]),
        ({"cgroup_limit_bytes": 16 * GIB}, "container limit", ["16.0 GiB", "64.0 GiB"]),
        ({"available_bytes": 5 * GIB}, "little free memory", ["5.0 GiB of 64.0 GiB"]),
        ({"swap_used_bytes": 2 * GIB}, "swap in use", ["2.0 GiB"]),
        ({"huge_pages": "never"}, "huge pages", ["never"]),
        ({"native_target": None}, "no native core", ["not built"]),
        ({"n_threads": 1}, "few threads", ["1 threads", "8 cores"]),
        ({"n_cores": 4, "n_threads": 4}, "few cores", ["4 of the machine's 8"]),
        ({"disk_read_bytes_per_s": 0.2e9}, "slow disk", ["/data", "0.2 GB/s"]),
    ],
)
def test_one_thing_wrong_is_found_alone(
    changes: dict[str, object], name: str, numbers: list[str]
) -> None:
    (finding,) = examine(replace(HEALTHY, **changes))  # type: ignore[arg-type]
    assert finding.name == name
    assert all(number in finding.what for number in numbers)
    assert len(finding.advice) > 20


def test_memory_in_a_container_is_measured_against_its_limit() -> None:
    inside = replace(HEALTHY, cgroup_limit_bytes=8 * GIB, available_bytes=6 * GIB)
    assert [f.name for f in examine(inside)] == ["container limit"]


def test_a_link_of_unknown_kind_is_not_judged() -> None:
    assert examine(replace(HEALTHY, link_bytes_per_s=1e9, pcie_generation=None)) == []
    assert examine(replace(HEALTHY, link_bytes_per_s=1e9, pcie_generation=9)) == []


def test_facts_of_this_machine(tmp_path: Path) -> None:
    said: list[str] = []
    facts = gather(tmp_path, said.append)
    assert 0 < facts.available_bytes <= facts.total_bytes
    assert 1 <= facts.n_cores <= facts.n_machine_cores
    assert facts.disk_read_bytes_per_s is not None
    assert facts.disk_read_bytes_per_s > 0
    assert said == ["host memory", f"disk at {tmp_path}"]
    assert all(finding.advice for finding in examine(facts))


def test_system_files_are_read(tmp_path: Path) -> None:
    assert cgroup_limit_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_limit_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1234567\n")
    assert cgroup_limit_bytes(tmp_path) == 1234567
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages(tmp_path / "enabled") == "madvise"
    assert huge_pages(tmp_path / "absent") is None


def test_the_drivers_answer_is_read() -> None:
    assert parse_pcie("NVIDIA A10G, 4, 8, 16") == ("NVIDIA A10G", 4, 8, 16)
    assert parse_pcie("NVIDIA GB10, [N/A], [N/A], 16") == ("NVIDIA GB10", None, None, 16)
    assert parse_pcie("") == (None, None, None, None)
