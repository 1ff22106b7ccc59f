"""Matrices that stay in a file's blocks: what the arithmetic gets instead of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sl_serve.weights.formats import Format


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedRows:
    """A matrix (out, in) by rows, or some rows of one."""

    data: torch.Tensor  # uint8 (n_rows, row_bytes), rows side by side
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.data), self.format.elements(self.data.shape[1])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: slice | torch.Tensor) -> QuantisedRows:
        return QuantisedRows(self.data[rows], self.format)

    def widened(self) -> torch.Tensor:
        """(n_rows, in) float32."""
        return self.format.widen(self.data)

    def t(self) -> QuantisedWeight:
        return QuantisedWeight((self,))


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """A matrix seen as (in, out). Sources that are joined may be in several formats: each run of
    outputs in one format is a part."""

    parts: tuple[QuantisedRows, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[1], sum(map(len, self.parts))

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def columns(self) -> Iterator[tuple[slice, QuantisedRows]]:
        """Which outputs each part gives."""
        start = 0
        for part in self.parts:
            yield slice(start, start + len(part)), part
            start += len(part)


Weight = torch.Tensor | QuantisedWeight  # (in, out)
Rows = torch.Tensor | QuantisedRows  # (out, in)
