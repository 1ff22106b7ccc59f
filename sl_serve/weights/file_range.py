"""Where a tensor's bytes lie, for those who read files themselves."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch


class FileRange(NamedTuple):
    path: Path
    offset_bytes: int
    size_bytes: int
    dtype: torch.dtype | None  # None: rows in blocks, as the checkpoint's `format` says
