from __future__ import annotations

import ctypes
import errno
import mmap
import platform
from pathlib import Path

import pytest

from sl_serve import host_memory, numa
from sl_serve.host_memory import host_empty
from sl_serve.numa import MPOL_INTERLEAVE, interleave, memory_nodes

GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}
MPOL_F_ADDR = 2  # of the page at an address


def policy_of(address: int) -> int:
    mode = ctypes.c_int(-1)
    call = ctypes.CDLL(None, use_errno=True).syscall
    flags = ctypes.c_ulong(MPOL_F_ADDR)
    number = ctypes.c_long(GET_MEMPOLICY[platform.machine()])
    where = ctypes.c_void_p(address)
    assert call(number, ctypes.byref(mode), None, ctypes.c_ulong(0), where, flags) == 0
    return mode.value


@pytest.mark.parametrize(
    ("text", "nodes"),
    [("0\n", [0]), ("0-1\n", [0, 1]), ("0,2-4,7", [0, 2, 3, 4, 7]), ("\n", [])],
)
def test_nodes_are_read_from_the_systems_list(tmp_path: Path, text: str, nodes: list[int]) -> None:
    listing = tmp_path / "has_memory"
    listing.write_text(text)
    assert memory_nodes(listing) == nodes


def test_no_list_no_nodes(tmp_path: Path) -> None:
    assert memory_nodes(tmp_path / "none") == []


def test_the_system_takes_the_policy_for_these_pages_alone() -> None:
    nodes = memory_nodes()
    if not nodes or platform.machine() not in numa.MBIND:
        pytest.skip("this system has no memory policies")
    area = mmap.mmap(-1, 1 << 22, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert policy_of(address) != MPOL_INTERLEAVE
    done = interleave(address, 1 << 21, nodes)
    if ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
        pytest.skip("this sandbox forbids memory policies")
    assert done
    assert policy_of(address) == MPOL_INTERLEAVE
    assert policy_of(address + (1 << 21)) != MPOL_INTERLEAVE


def test_another_processor_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "other")
    assert not interleave(0, 4096, [0])


@pytest.mark.parametrize(("nodes", "asked"), [([0], []), ([0, 1], [(5000, [0, 1])])])
def test_buffers_are_interleaved_where_there_are_several_nodes(
    monkeypatch: pytest.MonkeyPatch, nodes: list[int], asked: list[tuple[int, list[int]]]
) -> None:
    calls: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(host_memory, "memory_nodes", lambda: nodes)
    monkeypatch.setattr(host_memory, "interleave", lambda _, n, over: calls.append((n, over)))
    assert host_empty(5000).numel() == 5000
    assert calls == asked
