from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from sl_serve.openmp import release_workers

TASKS = Path("/proc/self/task")


def n_threads() -> int:
    return len(os.listdir(TASKS))


@pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted in /proc")
def test_idle_workers_of_the_calling_thread_end() -> None:
    found: list[int] = []

    def compute() -> None:
        torch.set_num_threads(3)
        before = n_threads()
        torch.ones(1 << 22).add_(1.0)
        found.append(n_threads() - before)
        release_workers()
        end_s = time.monotonic() + 10
        while n_threads() > before and time.monotonic() < end_s:
            time.sleep(0.01)
        found.append(n_threads() - before)
        assert torch.ones(1 << 22).sum() == 1 << 22  # they come again when they are needed
        release_workers()

    n_before = torch.get_num_threads()
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    torch.set_num_threads(n_before)
    assert found == [2, 0]
