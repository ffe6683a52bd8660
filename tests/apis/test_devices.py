"""Devices by name."""

from pathlib import Path

import pytest
import torch

from mmsnnet.apis import devices
from mmsnnet.errors import SettingError


def test_the_model_name_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: x\n\nprocessor\t: 1\nmodel name\t: Some CPU @ 2 GHz\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/proc/cpuinfo")
    assert devices.device_name(torch.device("cpu")) == "Some CPU @ 2 GHz"
    monkeypatch.setattr(Path, "read_text", lambda self: "processor\t: 0\nBogoMIPS\t: 50\n")
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "aarch64")
    assert devices.device_name(torch.device("cpu")) == "aarch64"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "there is no device 'tpu'"),
        ("meta", "device is a CPU or a CUDA device, got 'meta'"),
        ("cuda:99", r"there is no device 'cuda:99': PyTorch finds \d+ GPUs"),
    ],
)
def test_a_device_that_is_not_there_is_named(device: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        devices.checked_device(device)
