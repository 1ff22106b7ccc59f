"""A checkpoint as the bytes of its files: what the fuzz damages and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class GgufParts:
    """A GGUF file cut where its header has joints, so that the pieces can be put together anew."""

    version: bytes  # with the magic number in front
    settings: Sequence[bytes]  # key, type and value of each
    tensors: Sequence[bytes]  # name, sizes, type and offset of each
    data: bytes
    alignment: int = 32

    def joined(self) -> bytes:
        counts = b"".join(len(x).to_bytes(8, "little") for x in (self.tensors, self.settings))
        header = b"".join([self.version, counts, *self.settings, *self.tensors])
        return header + bytes(-len(header) % self.alignment) + self.data


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    files: Mapping[str, bytes]  # of a folder; a .gguf file stands alone
    gguf: GgufParts | None = None

    def write(self, folder: Path) -> Path:
        """Returns what `open_checkpoint` takes."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        ggufs = [name for name in self.files if name.endswith(".gguf")]
        return folder / ggufs[0] if ggufs else folder
