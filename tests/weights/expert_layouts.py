"""Layers with and without experts, some in blocks, in turns."""

from __future__ import annotations

import pytest
import torch

from sl_serve.weights.groups import GROUP_FORMATS
from sl_serve.weights.layout import LayerLayout, Param

EXPERT = "l{layer}.e{expert}"
PARAMS = [
    Param("own", (64, 24), ("l{layer}.own",), (24,)),
    Param("dense", (64, 300), ("l{layer}.dense",), (300,), layers=(0, 2)),
    Param("up", (64, 40), (f"{EXPERT}.a", f"{EXPERT}.b"), (24, 16), layers=(1, 3), n_experts=5),
    Param("bias", (40,), (f"{EXPERT}.bias",), (40,), layers=(1, 3), n_experts=5),
]
N_LAYERS = 4
LAYOUT = LayerLayout(PARAMS, torch.float32, n_layers=N_LAYERS)
INT8 = GROUP_FORMATS["int8_g64_sym"].format
SHORTER = LayerLayout(
    PARAMS,
    torch.float32,
    {f"l{i}.e{e}.{part}": INT8 for i in (1, 3) for e in range(5) for part in "ab"},
    N_LAYERS,
)

every_layout = pytest.mark.parametrize("layout", [LAYOUT, SHORTER], ids=["plain", "in-blocks"])
