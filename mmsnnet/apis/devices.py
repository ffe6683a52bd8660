"""Devices: checked, and named."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from mmsnnet.errors import SettingError


def checked_device(device: str | torch.device) -> torch.device:
    """The device of a name: a CPU or a CUDA device.

    Raises:
        SettingError: there is no such device, or it is of another type.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise SettingError(f"there is no device {device!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device is a CPU or a CUDA device, got {str(device)!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(f"there is no device {str(device)!r}: PyTorch finds {torch.cuda.device_count()} GPUs")
    return device


def device_name(device: torch.device) -> str:
    """The model name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
