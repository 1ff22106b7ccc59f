"""A model folder whose matrices are in blocks, as the layer image has them.

config.json says under `quantization_config` which tensor is in which format; such a tensor is uint8
(out, row_bytes). All others are plain. `weights/published/blocks.py` reads it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sl_serve.errors import UserError
from sl_serve.plan.budget import gib
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.fields import read_json_object
from sl_serve.weights.gguf_file import hf_settings
from sl_serve.weights.published.blocks import METHOD, VERSION

SHARD_BYTES = 2 << 30  # written at once; a layer is never cut in two
_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)


def check_absent(path: Path) -> None:
    """Raises UserError: nothing is written over."""
    if path.exists():
        raise UserError(f"{path} exists already; choose another OUT, or take it away")


@contextmanager
def new_folder(path: Path, n_bytes: int) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when all went well; otherwise nothing is left of it.
    `n_bytes`: about what it will take. Raises UserError."""
    check_absent(path)
    try:
        free_bytes = shutil.disk_usage(path.parent).free
        if free_bytes < n_bytes:
            raise UserError(
                f"{path}: about {gib(n_bytes)} are needed, {gib(free_bytes)} are free in "
                f"{path.parent.resolve()}; choose another disk"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror})") from None
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are for the owner alone
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({str(error)[:160]})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Shards:
    """Writes safetensors files, one as soon as enough has come, and their index."""

    def __init__(self, folder: Path, part_bytes: Sequence[int]) -> None:
        """`part_bytes`: about the size of each part that will be added, in order."""
        self._folder = folder
        self._ends = _ends(part_bytes)
        self._n_parts = 0
        self._waiting: dict[str, torch.Tensor] = {}
        self._shard_of: dict[str, str] = {}
        self._n_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._waiting |= tensors
        self._n_parts += 1
        if self._n_parts in self._ends:
            self._write(self._ends.index(self._n_parts) + 1)

    def _write(self, number: int) -> None:
        n_shards = len(self._ends)
        name = f"model-{number:05}-of-{n_shards:05}.safetensors"
        if n_shards == 1:
            name = "model.safetensors"
        save_file(
            {n: t.contiguous() for n, t in self._waiting.items()},
            self._folder / name,
            {"format": "pt"},
        )
        self._shard_of |= dict.fromkeys(self._waiting, name)
        self._n_bytes += sum(t.nbytes for t in self._waiting.values())
        self._waiting = {}
        if number == n_shards > 1:
            index = {"metadata": {"total_size": self._n_bytes}, "weight_map": self._shard_of}
            _write_json(self._folder / "model.safetensors.index.json", index)


def _ends(part_bytes: Sequence[int]) -> list[int]:
    """After how many parts each shard ends."""
    ends, n_bytes = [], 0
    for i, size in enumerate(part_bytes):
        if i and n_bytes + size > SHARD_BYTES:
            ends.append(i)
            n_bytes = 0
        n_bytes += size
    return [*ends, len(part_bytes)]


def write_settings(
    checkpoint: Checkpoint, formats: Mapping[str, str], calibration: Mapping[str, Any], to: Path
) -> None:
    """config.json, and the tokenizer as the model has it. `formats`: by name, of tensors in
    blocks."""
    source = checkpoint.path
    if source.is_dir():
        settings = read_json_object(source / "config.json")
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, to / name)
    else:
        settings = hf_settings(source)
        checkpoint.load_tokenizer().save(to)
    layout = {"quant_method": METHOD, "version": VERSION, "formats": formats}
    settings["quantization_config"] = {**layout, "calibration": calibration}
    _write_json(to / "config.json", settings)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
