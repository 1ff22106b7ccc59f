"""One case: a sample, damaged as its number says, and what opening it gives."""

from __future__ import annotations

import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import torch

from sl_serve.config import EngineConfig
from sl_serve.errors import UserError
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights.checkpoint import Checkpoint, open_checkpoint
from tests.weights.fuzz.byte_damage import BYTE_DAMAGE, Damage
from tests.weights.fuzz.gguf_damage import damage_gguf
from tests.weights.fuzz.json_damage import damage_json, damage_safetensors
from tests.weights.fuzz.processes import Verdict
from tests.weights.fuzz.sample import Sample

MAX_MESSAGE_CHARS = 1000
T = TypeVar("T")


def damaged(samples: Sequence[Sample], seed: int, number: int) -> Sample:
    """The same for the same arguments."""
    random = Random(f"{seed}/{number}")
    sample = random.choice(samples)
    files = dict(sample.files)
    n_rounds = random.choice((1, 1, 1, 2, 3))
    if sample.gguf is not None and random.random() < 0.6:
        files = {name: damage_gguf(random, sample.gguf) for name in files}
        n_rounds -= 1
    for _ in range(n_rounds):
        name = random.choice(sorted(files))
        files[name] = _damage_for(random, name)(random, files[name])
    return replace(sample, files=files)


def _damage_for(random: Random, name: str) -> Damage:
    if random.random() < 0.3 or name.endswith(".gguf"):
        return random.choice(BYTE_DAMAGE)
    return damage_safetensors if name.endswith(".safetensors") else damage_json


def judge(samples: Sequence[Sample], seed: int, folder: Path, number: int) -> Verdict:
    """Writes the case below `folder`, opens it and takes it away again."""
    place = Path(tempfile.mkdtemp(dir=folder))
    path = damaged(samples, seed, number).write(place)
    accepted, failure = try_checkpoint(path)
    shutil.rmtree(place)
    return Verdict(number, accepted, failure)


def try_checkpoint(path: Path) -> tuple[bool, str]:
    """Whether everything went well, and what went wrong though it must not, or ""."""
    attempts = _Attempts()
    checkpoint = attempts.make(partial(open_checkpoint, path))
    if checkpoint is not None:
        for name in checkpoint.names():
            attempts.make(partial(_read, checkpoint, name))
        attempts.make(partial(plan_checkpoint, checkpoint, EngineConfig()))
        attempts.make(checkpoint.load_tokenizer)
        checkpoint.close()
    return not attempts.n_refused and not attempts.failure, attempts.failure


@dataclass
class _Attempts:
    """Actions that may be refused; each is made whatever came of those before."""

    n_refused: int = 0
    failure: str = ""  # the first one

    def make(self, action: Callable[[], T]) -> T | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return action()
        except UserError as error:
            self.n_refused += 1
            self.failure = self.failure or _complaint(str(error))
        except BaseException:  # a panic in a package's Rust is no Exception
            self.failure = self.failure or traceback.format_exc()
        return None


def _complaint(message: str) -> str:
    """A refusal is one line that any terminal can print."""
    if message.isprintable() and 0 < len(message) <= MAX_MESSAGE_CHARS:
        return ""
    return f"not one printable sentence: {message[: 2 * MAX_MESSAGE_CHARS]!r}"


def _read(checkpoint: Checkpoint, name: str) -> None:
    """Where a file has the tensor's bytes as they are, they are those that the file has there; a
    matrix that is held in blocks stands for the same numbers in them."""
    tensor = checkpoint.read(name).clone()
    assert tuple(tensor.shape) == checkpoint.shape(name)
    format = checkpoint.format(name)
    if format.dtype is None and tensor.dim() == 2:
        widened = format.widen(checkpoint.read_blocks(name))
        assert widened.shape == tensor.shape
        # Past the largest float what is left depends on the order of the arithmetic.
        both = widened.isfinite() & tensor.isfinite()
        assert torch.equal(widened[both], tensor[both])
    location = checkpoint.location(name)
    if location is not None:
        assert location.dtype == format.dtype
        held = tensor if location.dtype is not None else checkpoint.read_blocks(name)
        assert location.size_bytes == held.nbytes
        with location.path.open("rb") as file:
            file.seek(location.offset_bytes)
            stored = file.read(location.size_bytes)
        assert bytes(held.flatten().view(torch.uint8).numpy()) == stored
