"""MXFP4, as gpt-oss has its experts: 4-bit floats (E2M1), 32 of which share a power of two (E8M0):
"OCP Microscaling Formats (MX) Specification", version 1.0, 5.3.3 and 5.4.1.

X_blocks (experts, out, n_groups, 16) uint8, the first of two numbers in the lower half of a byte;
X_scales (experts, out, n_groups) uint8. Each expert's matrices are seen by names of their own
(weights/stacked.py), in GGUF's blocks: the same bits in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sl_serve.errors import CheckpointError
from sl_serve.weights.fields import Fields
from sl_serve.weights.formats import BLOCK_FORMATS, Format
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published.packed import expect, modules_with
from sl_serve.weights.stacked import parts_of

BLOCKS, SCALES = "_blocks", "_scales"
GROUP_BYTES = 16


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    folder: HfFolder
    parts: tuple[str, str]  # the folder's tensors that it is in: numbers and scales
    expert: int
    outputs: slice  # of the expert's there
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        _, n_out, n_groups = self.folder.shape(self.parts[1])
        return len(range(n_out)[self.outputs]), n_groups * self.format.block_elements

    def location(self) -> None:
        """No file has it as it is held."""

    def blocks(self) -> torch.Tensor:
        """uint8 (out, row_bytes)."""
        numbers, scales = (
            self.folder.read_stored(part)[self.expert, self.outputs] for part in self.parts
        )
        blocks = torch.empty(*scales.shape, self.format.block_bytes, dtype=torch.uint8)
        first, last = numbers.chunk(2, dim=-1)  # numbers 0 to 15, and 16 to 31, of each group
        blocks[..., 0] = scales
        blocks[..., 1::2] = (first & 15) | (last << 4)
        blocks[..., 2::2] = (first >> 4) | (last & 0xF0)
        return blocks.flatten(1)

    def read(self) -> torch.Tensor:
        return self.format.widen(self.blocks())


def matrices(
    folder: HfFolder, _settings: Fields, _dequantised: torch.dtype
) -> dict[str, ExpertMatrix]:
    """Raises CheckpointError for damage."""
    found = {}
    for stack in modules_with(folder, BLOCKS):
        tensors = (stack + BLOCKS, stack + SCALES)
        for part in parts_of(folder.config, stack, _n_experts(folder, *tensors)):
            found[f"{part.module}.weight"] = ExpertMatrix(
                folder, tensors, part.expert, part.outputs, BLOCK_FORMATS["mxfp4"]
            )
    return found


def _n_experts(folder: HfFolder, blocks: str, scales: str) -> int:
    shape = folder.shape(blocks)
    if len(shape) != 4 or 0 in shape or shape[3] != GROUP_BYTES:
        raise CheckpointError(
            f"{folder.path}: tensor {blocks} has shape {shape}, expected (experts, outputs, "
            f"groups, {GROUP_BYTES})"
        )
    expect(folder, blocks, shape, [torch.uint8])
    if scales not in folder.names():
        raise CheckpointError(f"{folder.path}: no tensor {scales}")
    expect(folder, scales, shape[:3], [torch.uint8])
    return shape[0]
