"""The program of GPU measurements, as a dry run on the CPU, without OpenMMLab."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.python_processes import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from gpu import report, section_result
from gpu_sections import SECTIONS, Device, Row

CPU = Device("cpu", tiny=True, seconds=0.1)
# Python imports a module of this name in every process. The machine that may be lent has none of these packages.
SITECUSTOMIZE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mmengine", "mmcv", "mmseg", "mmdet", "fvcore", "cv2", "rich", "gradio"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


@pytest.mark.slow
def test_a_dry_run_without_openmmlab(tmp_path: Path) -> None:
    """Each section has rows, but for those that need a GPU; the table on the console is the file's."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    done = subprocess.run(
        [
            sys.executable,
            REPOSITORY / "benchmarks/gpu.py",
            "--device",
            "cpu",
            "--tiny",
            "--minutes",
            "8",
            "--out",
            "out",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out/gpu.json").read_text())
    assert list(results["sections"]) == list(SECTIONS) and results["machine"]["torch"]
    left_out = {name: section.get("left_out") for name, section in results["sections"].items() if "rows" not in section}
    assert left_out == {"cuda_graphs": "needs a GPU", "memory": "needs a GPU"}
    table = (tmp_path / "out/gpu.md").read_text()
    assert table in done.stdout and "| evaluation | shared prefixes |" in table and "logits of 0 differ" in table
    assert "--device cpu --tiny" in table and results["date"] in table


def fails(device: Device) -> list[Row]:
    raise RuntimeError(f"no memory on the {device.name}\nand details")


def dies(device: Device) -> list[Row]:
    os._exit(7)


def hangs(device: Device) -> list[Row]:
    time.sleep(600)
    return []


@pytest.mark.slow
def test_a_section_that_goes_wrong_says_why() -> None:
    results = {name: section_result(section, CPU, 30) for name, section in dict(fails=fails, dies=dies).items()}
    results["hangs"] = section_result(hangs, CPU, 1)
    errors = {name: result["error"] for name, result in results.items()}
    assert errors == dict(
        fails="RuntimeError: no memory on the cpu", dies="its process ended with status 7", hangs="stopped after 1 s"
    )
    table = report(dict(machine={}, date="today", command="python", sections=results))
    assert "| dies | failed | | | | its process ended with status 7 |" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_sections_are_left_out() -> None:
    assert section_result(SECTIONS["memory"], Device("cuda", True, 1), 60)["left_out"]


def test_cases_take_turns_until_the_time_is_over() -> None:
    """Three rounds at least, whatever they take; the order changes from round to round."""
    ran: list[str] = []
    times = Device("cpu", tiny=True, seconds=0).in_turns({n: lambda n=n: ran.append(n) for n in "ab"}, warmup=1)
    assert ran == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert all(took >= 0 for took in times.values())
