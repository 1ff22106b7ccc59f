"""Checkpoints have experts one by one, transformers joins them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

EXPERT = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
STACKED = re.compile(r"(.+)\[(\d+)\]")


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
    match = STACKED.fullmatch(name)
    if match is None:
        return parameters[name]
    stack, expert = match.groups()
    return parameters[stack][int(expert)].t()
