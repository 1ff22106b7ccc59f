"""Sizes as people write them, and what memory is free."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from sl_serve.errors import UserError
from sl_serve.plan.budget import available_bytes, exact_size, gib, parse_size

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8589934592", 8 * GIB),
        ("0", 0),
        ("512B", 512),
        ("700MB", 700_000_000),
        ("700 MB", 700_000_000),
        ("8G", 8_000_000_000),
        ("8GiB", 8 * GIB),
        (" 8gib ", 8 * GIB),
        ("8Gi", 8 * GIB),
        ("1.5KiB", 1536),
        ("2TB", 2 * 10**12),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 X", "-1", "1e9", "8GG", "1.GB", "0x10", "8 Gi B", "8I", "8IB", "8 iB"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="8GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 MiB"),
        (700 * MIB, "700 MiB"),
        (1023.4 * MIB, "1023 MiB"),
        (1023.7 * MIB, "1.0 GiB"),
        (GIB, "1.0 GiB"),
        (41.25 * GIB, "41.2 GiB"),
    ],
)
def test_sizes_are_written_for_people(n_bytes: float, text: str) -> None:
    assert gib(n_bytes) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0GiB"), (1, "1"), (1025, "1025"), (96 << 10, "96KiB"), (1025 << 20, "1025MiB")],
)
def test_exact_sizes_are_read_again(n_bytes: int, text: str) -> None:
    assert exact_size(n_bytes) == text
    assert parse_size(text) == n_bytes


Memory = namedtuple("Memory", "available")


@pytest.fixture
def free_10_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(10 * GIB))


CGROUP_FILES = {
    "v2_limit": "memory.max",
    "v2_usage": "memory.current",
    "v2_statistics": "memory.stat",
    "v1_statistics": "memory/memory.stat",
    "v1_limit": "memory/memory.limit_in_bytes",
    "v1_usage": "memory/memory.usage_in_bytes",
}


def cgroup(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / CGROUP_FILES[name]
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{content}\n")
    return folder


@pytest.mark.usefixtures("free_10_gib")
class TestAvailable:
    def test_without_control_groups_it_is_what_the_kernel_estimates(self, tmp_path: Path) -> None:
        assert available_bytes(tmp_path) == 10 * GIB

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_a_nearer_limit_counts_less_what_is_used(self, tmp_path: Path, version: str) -> None:
        files = {f"{version}_limit": 4 * GIB, f"{version}_usage": GIB}
        assert available_bytes(cgroup(tmp_path, **files)) == 3 * GIB

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_a_limit_further_off_does_not(self, tmp_path: Path, version: str) -> None:
        files = {f"{version}_limit": 64 * GIB, f"{version}_usage": GIB}
        assert available_bytes(cgroup(tmp_path, **files)) == 10 * GIB

    def test_max_is_no_limit(self, tmp_path: Path) -> None:
        assert available_bytes(cgroup(tmp_path, v2_limit="max", v2_usage=GIB)) == 10 * GIB

    def test_version_ones_number_for_no_limit_is_none(self, tmp_path: Path) -> None:
        files = {"v1_limit": 0x7FFFFFFFFFFFF000, "v1_usage": GIB}
        assert available_bytes(cgroup(tmp_path, **files)) == 10 * GIB

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_use_beyond_the_limit_leaves_nothing(self, tmp_path: Path, version: str) -> None:
        files = {f"{version}_limit": GIB, f"{version}_usage": 2 * GIB}
        assert available_bytes(cgroup(tmp_path, **files)) == 0

    def test_cached_files_that_can_be_dropped_are_free(self, tmp_path: Path) -> None:
        lines = f"anon 5\nfile {3 * GIB}\ninactive_file {GIB}\nactive_file 7"
        files = {"v2_limit": 4 * GIB, "v2_usage": 3 * GIB, "v2_statistics": lines}
        assert available_bytes(cgroup(tmp_path, **files)) == 2 * GIB

    def test_in_version_one_those_of_all_groups_below_are(self, tmp_path: Path) -> None:
        lines = f"inactive_file 4096\ntotal_cache 1\ntotal_inactive_file {2 * GIB}\n"
        files = {"v1_limit": 4 * GIB, "v1_usage": 3 * GIB, "v1_statistics": lines}
        assert available_bytes(cgroup(tmp_path, **files)) == 3 * GIB

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_more_cache_than_use_leaves_the_limit(self, tmp_path: Path, version: str) -> None:
        lines = f"inactive_file {2 * GIB}\ntotal_inactive_file {2 * GIB}"
        sizes = {"limit": 4 * GIB, "usage": GIB, "statistics": lines}
        files = {f"{version}_{name}": size for name, size in sizes.items()}
        assert available_bytes(cgroup(tmp_path, **files)) == 4 * GIB

    def test_a_limit_without_a_use_is_not_believed(self, tmp_path: Path) -> None:
        assert available_bytes(cgroup(tmp_path, v2_limit=GIB)) == 10 * GIB
