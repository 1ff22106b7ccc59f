"""Operations with a pure-torch reference each, and faster versions behind the same name."""

from __future__ import annotations

import logging

import torch

from sl_serve.config import ActivationName, DTypeName
from sl_serve.device import Device
from sl_serve.errors import UserError
from sl_serve.ops.protocol import CAUSAL, KVRegion, Ops, Scoring
from sl_serve.ops.torch_ops import TorchOps

__all__ = ["CAUSAL", "KVRegion", "Ops", "Scoring", "TorchOps", "choose_ops"]

logger = logging.getLogger(__name__)


def choose_ops(
    dtype: DTypeName,
    n_threads: int,
    native: bool = True,
    device: Device | None = None,
    activations: ActivationName = "float32",
) -> Ops:
    """The fastest operations for `dtype` on `device` (the processor, if none is given); says once
    when they are the slow ones. Raises UserError if it cannot compute with `dtype`, or not with
    such activations."""
    in_place, rounds = device is None or device.in_place, activations == "int8"
    if rounds and not (in_place and dtype == "float32"):
        raise UserError(
            "--activations int8 is for the processor and float32; leave it out, or --device and "
            "--dtype"
        )
    if device is not None and not in_place:
        return _device_ops(device, getattr(torch, dtype))
    if not native or dtype != "float32":
        return TorchOps(getattr(torch, dtype), rounds=rounds)
    try:
        from sl_serve.ops.native_ops import NativeOps

        return NativeOps(n_threads, rounds=rounds)
    except ImportError:
        logger.warning("the native core is not built: attention runs in plain torch, slower")
        return TorchOps(rounds=rounds)


def _device_ops(device: Device, dtype: torch.dtype) -> Ops:
    from sl_serve.ops.device_ops import DeviceOps, find_flash_attention

    device.check_dtype(dtype)
    flash = find_flash_attention(device.torch_device, dtype)
    if device.torch_device.type == "cuda":
        try:
            from sl_serve.ops.triton_ops import TritonOps

            ops = TritonOps(device, dtype, flash)
            ops.check()
            return ops
        except ImportError:
            logger.info("triton is not installed: layers are expanded by torch, slower")
        except Exception as error:  # of the compilers below it, of any kind
            logger.warning("triton does not work here, torch does without: %s", error)
    return DeviceOps(device, dtype, flash)
