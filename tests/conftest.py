from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sl_serve.weights.locate import resolve_model
from tests.models import write_tiny_llama


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return resolve_model("smollm2")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A tiny Llama's folder and its reference."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    return folder, write_tiny_llama(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many small operations: threads would wait for each other longer than they work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
