"""Operations with a pure-torch reference each, and faster versions behind the same name."""

from __future__ import annotations

import logging

import torch

from sl_serve.config import DTypeName
from sl_serve.ops.protocol import KVRegion, Ops
from sl_serve.ops.torch_ops import TorchOps

__all__ = ["KVRegion", "Ops", "TorchOps", "choose_ops"]

logger = logging.getLogger(__name__)


def choose_ops(dtype: DTypeName, n_threads: int, native: bool = True) -> Ops:
    """The fastest operations for `dtype` on this machine; says once when they are the slow ones."""
    if not native or dtype != "float32":
        return TorchOps(getattr(torch, dtype))
    try:
        from sl_serve.ops.native_ops import NativeOps

        return NativeOps(n_threads)
    except ImportError:
        logger.warning("the native core is not built: attention runs in plain torch, slower")
        return TorchOps()
