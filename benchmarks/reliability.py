"""Kill training runs and evaluations at random moments, resume them, and compare them with uninterrupted runs.

The tools run on a tiny stitched model and procedural shapes. A training run is killed (SIGKILL) up to four times and
resumed until it ends. It must then equal a run that was never killed: the weights, optimizer, schedules and log history
of the last checkpoint (to the bit), the names of all files, the best checkpoint, the logged losses and the validations.
An evaluation must write the same file of operating points. Times and memory may differ. The status is 1 if anything
else does; the folders of such runs are kept.

    python benchmarks/reliability.py [--trainings 30] [--evaluations 10] [--seed 0] [--folder FOLDER]
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = str(REPOSITORY)  # the server that processes fork from starts with it
sys.path.insert(0, str(REPOSITORY))

from mmsnnet.datasets import write_shapes  # noqa: E402
from mmsnnet.models.checkpoint_reading import read_model_checkpoint  # noqa: E402
from tests.python_processes import PythonProcess  # noqa: E402

MOST_KILLS = 4
CONFIG = """
_base_ = {base!r}
data_root = {data!r}
A = dict(model="vit_tiny_patch16_224", patch_size=8, num_heads=2)
model = dict(
    backbone=dict(
        anchors=[dict(A, embed_dim=32, depth=2), dict(A, embed_dim=48, depth=4)],
        out_indices=dict(train=(2, 3), test=(3,)), flops_step=1e6,
    ),
    decode_head=dict(in_channels=48), auxiliary_head=dict(in_channels=48),
)
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
randomness = dict(seed={seed})
test_cfg = dict(stitches_per_pass=1)
"""
ITERATIONS = """
param_scheduler = [dict(type="LinearLR", start_factor=0.1, begin=0, end=15, by_epoch=False)]
train_cfg = dict(max_iters=20, val_interval={validation})
default_hooks = dict(
    logger=dict(interval=2),
    checkpoint=dict(interval={checkpoint}, max_keep_ckpts={keep}, save_best="L/mIoU"),
)
"""
EPOCHS = """
param_scheduler = [dict(type="LinearLR", start_factor=0.1, begin=0, end=4, by_epoch=True)]
train_dataloader.update(sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True))
train_cfg = dict(_delete_=True, type="mmsnnet.StitchEpochBasedTrainLoop", max_epochs=5, val_interval={validation})
default_hooks = dict(
    logger=dict(interval=2, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval={checkpoint}, max_keep_ckpts={keep}, save_best="L/mIoU"),
)
log_processor = dict(by_epoch=True)
"""


@dataclass(frozen=True)
class Variant:
    """A training run: its loop, and the intervals of validations and checkpoints, in iterations or epochs."""

    loop: str
    validation: int
    checkpoint: int
    keep: int

    def __str__(self) -> str:
        return f"{self.loop}, validation {self.validation}, checkpoint {self.checkpoint}, keep {self.keep}"

    def write_config(self, path: Path, data: Path) -> None:
        base = str(REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py")
        part = ITERATIONS if self.loop == "iterations" else EPOCHS
        part = part.format(validation=self.validation, checkpoint=self.checkpoint, keep=self.keep)
        path.write_text(CONFIG.format(base=base, data=str(data), seed=VARIANTS.index(self)) + part)


# Validations and checkpoints that coincide always, sometimes or at the end only.
VARIANTS = (
    *(Variant("iterations", 5, 5, 1), Variant("iterations", 10, 5, 2), Variant("iterations", 4, 6, 3)),
    *(Variant("iterations", 7, 3, -1), Variant("iterations", 5, 10, 1), Variant("epochs", 1, 1, 2)),
    *(Variant("epochs", 2, 1, 1), Variant("epochs", 1, 2, 3), Variant("epochs", 2, 3, -1)),
)


class Runs:
    """Runs the tools in processes, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_shapes(folder / "data", "shapes", train=16, val=4, size=(64, 64))
        self.references: dict[Variant, tuple[Path, float]] = {}
        self.finish("train", "--help")  # the first process waits for the imports of the server

    def start(self, tool: str, *arguments: object) -> PythonProcess:
        output = Path(tempfile.mkdtemp(dir=self.folder, prefix="output-"))
        script = REPOSITORY / "tools" / f"{tool}.py"
        return PythonProcess(script, *arguments, folder=self.folder, output=output, OMP_NUM_THREADS=1)

    def finish(self, tool: str, *arguments: object) -> float:
        """Run a tool to its end; return its seconds."""
        start = time.monotonic()
        check_end(self.start(tool, *arguments))
        return time.monotonic() - start

    def kill_and_resume(self, tool: str, *arguments: object, seconds: float, generator: random.Random) -> int:
        """Kill a tool at random moments of its ``seconds``, and resume it until it ends; return the number of kills."""
        kills = 0
        for _ in range(generator.randint(2, MOST_KILLS)):
            attempt = self.start(tool, *arguments, *(["--resume"] if kills else []))
            attempt.process.join(seconds * generator.uniform(0.2, 0.8))
            if attempt.process.exitcode is not None:
                check_end(attempt)
                return kills
            attempt.process.kill()
            attempt.process.join()
            kills += 1
        self.finish(tool, *arguments, "--resume")
        return kills

    def reference(self, variant: Variant) -> tuple[Path, float]:
        """The folder of an uninterrupted run, and its seconds."""
        if variant not in self.references:
            folder = self.folder / f"reference-{VARIANTS.index(variant)}"
            variant.write_config(folder.with_suffix(".py"), self.data)
            seconds = self.finish("train", folder.with_suffix(".py"), "--work-dir", folder)
            self.references[variant] = folder, seconds
        return self.references[variant]

    def train(self, variant: Variant, folder: Path, generator: random.Random) -> tuple[int, list[str]]:
        """A run that is killed and resumed: the number of kills, and how it differs from the uninterrupted run."""
        reference, seconds = self.reference(variant)
        config = reference.with_suffix(".py")
        kills = self.kill_and_resume("train", config, "--work-dir", folder, seconds=seconds, generator=generator)
        return kills, list(training_differences(reference, folder))

    def evaluate(self, variant: Variant, folder: Path, generator: random.Random) -> tuple[int, list[str]]:
        """An evaluation that is killed and resumed, compared in the same way."""
        reference, _ = self.reference(variant)
        arguments = ("test", reference.with_suffix(".py"), last_checkpoint(reference), "--work-dir")
        whole = reference / "evaluation"
        if not whole.exists():
            self.finish(*arguments, whole)
        seconds = self.finish(*arguments, folder / "timed")
        shutil.rmtree(folder / "timed")
        kills = self.kill_and_resume(*arguments, folder, seconds=seconds, generator=generator)
        return kills, list(evaluation_differences(whole, folder))


def check_end(process: PythonProcess) -> None:
    """Wait for a tool, which must succeed."""
    done = process.wait()
    if done.returncode != 0:
        lines = done.stderr.splitlines() or [""]
        raise ChildProcessError(f"{' '.join(done.args)} ended with {done.returncode}: {lines[-1]}")


def last_checkpoint(folder: Path) -> Path:
    return folder / Path((folder / "last_checkpoint").read_text().strip()).name


def file_names(folder: Path) -> set[str]:
    """The files of a run, without those in the folder of each attempt."""
    return {path.name for path in folder.iterdir() if path.is_file()}


def training_differences(expected: Path, found: Path) -> Iterator[str]:
    """How two work folders differ: whole parts, of which each names its first difference."""
    names = file_names(expected), file_names(found)
    if names[0] != names[1]:
        yield f"files: missing {sorted(names[0] - names[1])}, left over {sorted(names[1] - names[0])}"
    contents = [contents_of(last_checkpoint(folder), folder) for folder in (expected, found)]
    for part in sorted(contents[0].keys() | contents[1].keys()):
        if first := next(differences(contents[0].get(part), contents[1].get(part), part), None):
            yield f"{last_checkpoint(expected).name}: {first}"
    for name in sorted(name for name in names[0] & names[1] if name.startswith("best_")):
        best = [read_model_checkpoint(folder / name)["state_dict"] for folder in (expected, found)]
        if first := next(differences(*best, "state_dict"), None):
            yield f"{name}: {first}"
    for kind in ("training", "validation"):
        logs = [
            {step: line for (one, step), line in scalars(folder).items() if one == kind} for folder in (expected, found)
        ]
        if logs[0].keys() != logs[1].keys():
            missing, more = (sorted(logs[a].keys() - logs[1 - a].keys()) for a in (0, 1))
            yield f"{kind}: no log of steps {missing}, one of steps {more} which the other run lacks"
        elif first := next(differences(logs[0], logs[1], "step"), None):
            yield f"{kind}: {first}"


def evaluation_differences(expected: Path, found: Path) -> Iterator[str]:
    names = file_names(expected), file_names(found)
    if names[0] != names[1]:
        yield f"files: missing {sorted(names[0] - names[1])}, left over {sorted(names[1] - names[0])}"
    elif (expected / "operating_points.json").read_bytes() != (found / "operating_points.json").read_bytes():
        yield "operating_points.json differs"


def contents_of(path: Path, folder: Path) -> dict[str, Any]:
    """The parts of a checkpoint that a resumed run continues from, without times and the path of the run."""
    content = read_model_checkpoint(path)
    hub = content["message_hub"]
    hub["log_scalars"] = {name: value for name, value in hub["log_scalars"].items() if not is_measured(name)}
    hub["runtime_info"] = {
        name: value.replace(str(folder), "") if isinstance(value, str) else value
        for name, value in hub["runtime_info"].items()
        if name not in ("cfg", "experiment_name") and not is_measured(name)
    }
    # A run that was killed before it deleted old checkpoints records them once more.
    kept = hub["runtime_info"].get("keep_ckpt_ids", [])
    existing = [step for step in kept if path.with_name(re.sub(r"\d+", str(step), path.name)).exists()]
    hub["runtime_info"]["keep_ckpt_ids"] = existing
    meta = {name: content["meta"][name] for name in ("epoch", "iter", "seed")}
    parts = {name: hub[name] for name in ("log_scalars", "runtime_info")} | dict(meta=meta)
    return parts | {name: content.get(name) for name in ("state_dict", "optimizer", "param_schedulers")}


def is_measured(name: str) -> bool:
    return re.search("time|memory|eta", name) is not None


def scalars(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What the attempts of a run logged, by kind and step, without times; a later attempt replaces earlier lines."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(folder.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime_ns):
        for text in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # a killed process leaves half a line
                line = {name: value for name, value in json.loads(text).items() if not is_measured(name)}
                lines["training" if "loss" in line else "validation", line["step"]] = line
    return lines


def differences(expected: Any, found: Any, where: str) -> Iterator[str]:
    """Where two nested values differ, to the bit."""
    if isinstance(expected, HistoryBuffer) and isinstance(found, HistoryBuffer):
        expected, found = ([list(part) for part in value.data] for value in (expected, found))
    if type(expected) is not type(found):
        yield f"{where} is {found!r:.60} instead of {expected!r:.60}"
    elif isinstance(expected, dict):
        if expected.keys() != found.keys():
            yield f"{where} differs in the keys {sorted(map(str, expected.keys() ^ found.keys()))[:5]}"
        for key in expected.keys() & found.keys():
            yield from differences(expected[key], found[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        if len(expected) != len(found):
            yield f"{where} has {len(found)} entries instead of {len(expected)}"
        for index, (one, other) in enumerate(zip(expected, found, strict=False)):
            yield from differences(one, other, f"{where}.{index}")
    elif isinstance(expected, torch.Tensor):
        if expected.dtype != found.dtype or expected.shape != found.shape or as_bytes(expected) != as_bytes(found):
            yield f"{where} has other values"
    elif (
        np.asarray(expected).tobytes() != np.asarray(found).tobytes()
        if isinstance(expected, float)
        else expected != found
    ):
        yield f"{where} is {found!r:.60} instead of {expected!r:.60}"


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=30)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the variants, the numbers of kills and their moments")
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary folder)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="reliability-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs, start = Runs(folder), time.monotonic()
    table = Table("run", "variant", "kills", "differences")
    totals = {"training": [0, 0, 0], "evaluation": [0, 0, 0]}  # runs, kills, runs that differ
    for kind, number in (("training", args.trainings), ("evaluation", args.evaluations)):
        for index in range(number):
            generator = random.Random(f"{args.seed} {kind} {index}")
            variant, name = generator.choice(VARIANTS), f"{kind}-{index}"
            try:
                run = runs.train if kind == "training" else runs.evaluate
                kills, found = run(variant, folder / name, generator)
            except ChildProcessError as error:
                kills, found = 0, [str(error)]
            for position, each in enumerate((1, kills, bool(found))):
                totals[kind][position] += each
            table.add_row(name, str(variant), str(kills), "\n".join(found) or "none")
            print(f"{name}: {variant}: {kills} kills, {len(found)} differences", *found, sep="\n    ", flush=True)
            if not found:
                shutil.rmtree(folder / name)
    Console().print(table)
    for kind, (number, kills, differing) in totals.items():
        print(f"{kind}: {number} runs, {kills} kills, {differing} runs differ")
    failed = any(differing for _, _, differing in totals.values())
    print(f"{time.monotonic() - start:.0f} s" + (f"; the runs that differ are in {folder}" if failed else ""))
    if not failed:
        shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    main()
