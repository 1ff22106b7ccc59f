"""Checkpoints have experts one by one, transformers joins them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

EXPERT = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
OF_GPT_OSS = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.(weight|bias)")
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)
# Module -> the stack it is in, and its outputs there.
STACKS = {
    "gate_proj": ("gate_up_proj", EVEN),
    "up_proj": ("gate_up_proj", ODD),
    "down_proj": ("down_proj", slice(None)),
}


def joined_expert(parameters: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    match = EXPERT.fullmatch(name)
    if match is None:
        return parameters[name]
    layer, expert, matrix = match.groups()
    if matrix in ("w2", "down_proj"):
        return parameters[f"{layer}.mlp.experts.down_proj"][int(expert)]
    gate, up = parameters[f"{layer}.mlp.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if matrix in ("w1", "gate_proj") else up


def stacked_expert(parameters: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Of gpt-oss: stacks of matrices (in, out), gates and what they let pass by turns."""
    match = OF_GPT_OSS.fullmatch(name)
    if match is None:
        return parameters[name]
    start, expert, module, kind = match.groups()
    stack, outputs = STACKS[module]
    end = "_bias" if kind == "bias" else ""
    return parameters[f"{start}.{stack}{end}"][int(expert), ..., outputs].t()
