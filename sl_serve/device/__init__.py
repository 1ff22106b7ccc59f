"""The seam between the sweep and a machine."""

from __future__ import annotations

from sl_serve.config import DeviceName
from sl_serve.device.base import Device, Event, Stream
from sl_serve.device.cpu import CpuDevice
from sl_serve.device.sim import SimDevice

__all__ = ["CpuDevice", "Device", "Event", "SimDevice", "Stream", "open_device"]


def open_device(name: DeviceName) -> Device:
    return CpuDevice() if name == "cpu" else SimDevice()
