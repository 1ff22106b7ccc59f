"""A file of random bytes, some pieces long."""

from __future__ import annotations

from pathlib import Path

import torch

from sl_serve.weights.direct_file import PIECE_BYTES

FILE_BYTES = 3 * PIECE_BYTES + 12_345
CONTENT = torch.randint(
    0, 256, (FILE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


def write_random_file(folder: Path) -> Path:
    path = folder / "weights"
    path.write_bytes(CONTENT.numpy().tobytes())
    return path
