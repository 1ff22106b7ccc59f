"""The seam between the sweep and a machine."""

from __future__ import annotations

from sl_serve.config import DeviceName
from sl_serve.device.base import Device, Event, HostWork, Stream
from sl_serve.device.cpu import CpuDevice
from sl_serve.device.cuda import CudaDevice, cuda_budget_bytes
from sl_serve.device.sim import SimDevice
from sl_serve.device.timeline import Span

__all__ = [
    "CpuDevice",
    "CudaDevice",
    "Device",
    "Event",
    "HostWork",
    "SimDevice",
    "Span",
    "Stream",
    "device_budget_bytes",
    "open_device",
]

_DEVICES: dict[DeviceName, type[CpuDevice | CudaDevice | SimDevice]] = {
    "cpu": CpuDevice,
    "cuda": CudaDevice,
    "sim": SimDevice,
}


def open_device(name: DeviceName) -> Device:
    """Raises UserError where this machine has no such device."""
    return _DEVICES[name]()


def device_budget_bytes(name: DeviceName, ceiling_bytes: int | None) -> int | None:
    """What may be taken of the device's own memory: all that is free there, or a ceiling. None
    where it has none, or where a simulation sets no limit.

    Raises UserError where this machine has no such device, MemoryBudgetError for a ceiling above
    what is free.
    """
    if name == "cuda":
        return cuda_budget_bytes(ceiling_bytes)
    return ceiling_bytes if name == "sim" else None
