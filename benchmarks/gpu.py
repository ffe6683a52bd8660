"""What only a GPU can show, in one command of under 8 minutes.

Each section (``benchmarks/gpu_sections.py``) runs in a process of its own. If one fails, dies or takes too long, its
row says why and the others go on. After each section the results are written to ``OUT/gpu.json`` and ``OUT/gpu.md``.
The program needs torch and timm, but not OpenMMLab. The second command is a dry run on a CPU, which takes seconds:

    PYTHONPATH=. python benchmarks/gpu.py [--out work_dirs/gpu] [--minutes 7] [--sections forward training ...]
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --tiny
"""

import argparse
import json
import multiprocessing
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from gpu_sections import SECTIONS, Device, NeedsGPUError, Section

from mmsnnet.files.writing import write_atomically

HEADINGS = ("section", "case", "value", "ratio", "to", "note")


def describe(device: str) -> dict[str, str]:
    """The name of the device and the versions that a figure depends on."""
    about = dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__)
    if device == "cpu":
        return dict(device=platform.processor() or platform.machine(), **about)
    cuda = dict(cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version()))
    return dict(
        device=torch.cuda.get_device_name(), **cuda, nccl=".".join(map(str, torch.cuda.nccl.version())), **about
    )


def run_section(section: Section, device: Device, results: Connection) -> None:
    """Run a section in this process; send its rows or the reason why there are none."""
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    try:
        if device.is_gpu and not torch.cuda.is_available():
            raise NeedsGPUError("torch finds no GPU")
        if device.tiny:
            torch.set_num_threads(1)
        result = dict(machine=describe(device.name), rows=[asdict(row) for row in section(device)])
    except NeedsGPUError as error:
        result = dict(left_out=str(error))
    except Exception as error:
        result = dict(error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
    results.send(result)


def section_result(section: Section, device: Device, limit: float) -> dict[str, Any]:
    """Run a section in a new process and wait for it, at most ``limit`` seconds."""
    # CUDA does not survive a fork. The fork server imports torch once, and never touches the device.
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_section, args=(section, device, sender))
    start = time.monotonic()
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(limit) else dict(error=f"stopped after {limit:.0f} s")
    except EOFError:
        process.join()
        result = dict(error=f"its process ended with status {process.exitcode}")
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    return result | dict(seconds=round(time.monotonic() - start, 1))


def report(results: Mapping[str, Any]) -> str:
    """The results as one table in Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items() if key != "device")
    lines = [
        f"{results['machine'].get('device', 'no device')}; {machine}; {results['date']}; `{results['command']}`",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
    ]
    for name, section in results["sections"].items():
        if "rows" not in section:
            why = section.get("error", section.get("left_out"))
            lines.append(f"| {name} | {'failed' if 'error' in section else 'left out'} | | | | {why} |")
        for row in section.get("rows", ()):
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
            value = f"{row['value']:.4g} {row['unit']}"
            lines.append(f"| {name} | {row['case']} | {value} | {ratio} | {row['to']} | {row['note']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a dry run")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=7, help="for all sections together")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["mmsnnet.stitching"])
    results: dict[str, Any] = dict(
        command=shlex.join(["python", *sys.argv]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine={},
        sections={},
    )
    end = time.monotonic() + 60 * args.minutes
    for number, name in enumerate(args.sections):
        left = end - time.monotonic()
        if left < 1:
            result: dict[str, Any] = dict(left_out="no time was left")
        else:
            # A section repeats for half its share of the time. What it needs beyond that is building and warming up.
            share = left / (len(args.sections) - number)
            device = Device(args.device, args.tiny, share / 2)
            result = section_result(SECTIONS[name], device, min(left, 3 * share))
        results["machine"] = result.pop("machine", results["machine"])
        results["sections"][name] = result
        write_atomically(args.out / "gpu.json", json.dumps(results, indent=1).encode())
        write_atomically(args.out / "gpu.md", report(results).encode())
        print(f"{name}: {result.get('error') or result.get('left_out') or 'done'}", flush=True)
    print(f"\n{report(results)}")
    return int(any("error" in section for section in results["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
