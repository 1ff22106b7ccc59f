"""The embedding table, in memory or left in the checkpoint's file and read row by row."""

from __future__ import annotations

import os
from typing import Protocol

import torch

from sl_serve.errors import WeightReadError
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.quantised import QuantisedRows


class Embedding(Protocol):
    def lookup(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A table (n, hidden) and, for each of token_ids (T), its row in it."""
        ...

    def close(self) -> None: ...


class ResidentEmbedding:
    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def lookup(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._table, token_ids

    def close(self) -> None:
        pass


class QuantisedEmbedding:
    """Widened row by row: a step needs few."""

    def __init__(self, table: QuantisedRows) -> None:
        self._table = table

    def lookup(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wanted, rows = torch.unique(token_ids, return_inverse=True)
        return self._table[wanted].widened(), rows

    def close(self) -> None:
        pass


class FileEmbedding:
    """A step needs a few rows of some kilobytes each: read through the page cache, where the rows
    of common tokens stay."""

    def __init__(self, location: FileRange, n_rows: int, hidden_size: int) -> None:
        assert location.dtype is not None
        self._location, self._dtype, self._hidden_size = location, location.dtype, hidden_size
        self._row_bytes = location.size_bytes // n_rows
        self._file = open(location.path, "rb", buffering=0)  # noqa: SIM115  (kept open)

    def lookup(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises WeightReadError when the file has become unreadable or shorter."""
        wanted, rows = torch.unique(token_ids, return_inverse=True)
        lines = bytearray(len(wanted) * self._row_bytes)
        view = memoryview(lines)
        for i, token_id in enumerate(wanted.tolist()):
            row = view[i * self._row_bytes : (i + 1) * self._row_bytes]
            self._read(row, self._location.offset_bytes + token_id * self._row_bytes)
        table = torch.frombuffer(lines, dtype=torch.uint8)
        return table.view(self._dtype).view(-1, self._hidden_size), rows

    def close(self) -> None:
        self._file.close()

    def _read(self, into: memoryview, offset: int) -> None:
        try:
            n = os.preadv(self._file.fileno(), [into], offset)
        except OSError as error:
            raise WeightReadError(
                f"{self._location.path}: reading at byte {offset} failed ({error.strerror}); "
                "check the disk"
            ) from None
        if n < len(into):
            raise WeightReadError(
                f"{self._location.path}: ends at byte {offset + n}, bytes up to "
                f"{offset + len(into)} are needed; it was cut short while in use"
            )
