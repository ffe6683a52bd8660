"""Two processes on this machine's CPU, launched by the scripts that users launch theirs by, and what becomes of the run
when something happens to one of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmsnnet.apis import build_model, load_config
from tests.ports import free_port
from tests.python_processes import PythonProcess

pytestmark = pytest.mark.distributed
REPOSITORY = Path(__file__).parents[2]
REAL = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"
STAGED = REPOSITORY / "configs/quickstart/stitched-swin-s-l_upernet_shapes-64x64.py"
BEFORE, ITERATIONS, EVERY = 5, 8, 2  # iterations that a run struck by trouble ends with; those of a whole run
STITCHES = "S,L,L3-S2-L6"

# What a config imports: it happens to rank 1, if at all.
TROUBLE = f"""
import os
import signal
import time
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS


@HOOKS.register_module()
class Trouble(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 1 and runner.iter == {BEFORE}:
            if os.environ.get("TROUBLE") == "killed":
                Path(runner.work_dir, "struck").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ.get("TROUBLE") == "nan":
                data_batch["inputs"] = [image * float("nan") for image in data_batch["inputs"]]


@TRANSFORMS.register_module()
class Mortal:
    def __call__(self, sample):
        in_worker = torch.utils.data.get_worker_info() is not None
        if os.environ.get("TROUBLE") == "worker" and os.environ.get("RANK") == "1" and in_worker:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample
"""
# Stands for Slurm: every node is this machine.
SRUN = """
import os, subprocess, sys, time

options, command = {}, sys.argv[1:]
while command[0].startswith("-"):
    name, _, options[name] = command.pop(0).partition("=")
tasks, per_node = int(options["--ntasks"]), int(options["--ntasks-per-node"])
step = dict(SLURM_STEP_NUM_TASKS=tasks, SLURM_STEP_NUM_NODES=-(-tasks // per_node), SLURM_STEP_NODELIST="node[1-9]")
step |= dict(SLURM_JOB_ID=os.getpid(), SLURM_STEP_ID=0, SLURM_NTASKS=tasks)
started = []
for task in range(tasks):
    own = dict(SLURM_PROCID=task, SLURM_LOCALID=task % per_node)
    environment = os.environ | {name: str(value) for name, value in (step | own).items()}
    started.append(subprocess.Popen(command, env=environment))
while (ended := [process.poll() for process in started]) != [0] * tasks:
    if any(ended) and options["--kill-on-bad-exit"] == "1":
        for process in started:
            process.terminate()
        sys.exit(f"srun: error: tasks ended with {ended}")
    time.sleep(0.1)
"""
# Stands for torchrun where how a tool is launched is beside the point: a rank of two, with its imports done.
RANK = """
import os, runpy, sys

port, *sys.argv, rank = sys.argv[1:]
os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", CUDA_VISIBLE_DEVICES="-1")
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NOTES = '#!/bin/sh\necho "${0##*/}" "$@"\n'  # a program that says how it is called


@dataclass(frozen=True)
class Ended:
    """What has ended, its processes included: its status, what it said, and when it was."""

    status: int
    said: str
    time: float

    @property
    def cause(self) -> str:
        """What torchrun takes for the cause."""
        _, found, cause = self.said.partition("Root Cause")
        assert found, self.said
        return cause


class Runs:
    """``runs("dist_train.sh", *arguments, NAME=value)`` runs a tool to its end, with environment variables in addition;
    ``srun`` and ``scontrol`` are stand-ins. A script in Python, which no launcher starts, starts with its imports done.

    Args:
        folder: for them.
        noted: programs in whose place one runs that only says how it is called.
    """

    def __init__(self, folder: Path, *noted: str) -> None:
        self.folder = folder
        programs = {"python": f'#!/bin/sh\nexec {sys.executable} "$@"\n', "srun": f"#!{sys.executable}\n{SRUN}"}
        programs |= {"scontrol": "#!/bin/sh\necho 127.0.0.1\n"} | dict.fromkeys(noted, NOTES)
        (folder / "bin").mkdir()
        for name, text in programs.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def __call__(self, tool: str, *arguments: object, **variables: object) -> Ended:
        if tool.endswith(".py"):
            output = Path(tempfile.mkdtemp(dir=self.folder))
            variables |= dict(CUDA_VISIBLE_DEVICES="-1")
            script = PythonProcess(
                REPOSITORY / "tools" / tool, *arguments, folder=self.folder, output=output, **variables
            )
            done = script.wait()
            return Ended(done.returncode, done.stdout + done.stderr, time.time())
        others = ("SLURM_", "MASTER_", "OMP_", "MKL_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        environment |= dict(PATH=f"{self.folder / 'bin'}:{os.environ['PATH']}", COLUMNS="120")
        environment |= dict(PYTHONPATH=f"{REPOSITORY}:{self.folder}", CUDA_VISIBLE_DEVICES="-1")
        environment |= {name: str(value) for name, value in variables.items()}
        command = ["bash", str(REPOSITORY / "tools" / tool), *map(str, arguments)]
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                # What a process that is left could still write to is not at its end.
                said, _ = process.communicate(timeout=600)
            except BaseException:
                process.terminate()  # which a launcher passes on
                process.communicate(timeout=60)
                raise
        return Ended(process.returncode, said, time.time())


@pytest.fixture(scope="module")
def run_two(run_ranks: Callable[..., None]) -> Callable[..., None]:
    """``run_two("train.py", *arguments)``: two processes of a tool that succeed, without a launcher."""

    def run(tool: str, *arguments: object) -> None:
        run_ranks("-c", RANK, free_port(), REPOSITORY / "tools" / tool, *arguments, "--launcher", "pytorch")

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def work(runs: Runs) -> Path:
    """The work folder of the run that is struck and resumed."""
    return runs.folder / "work"


@pytest.fixture(scope="module")
def config(data: Path, runs: Runs) -> Path:
    """The quickstart's config of a stitched model, cut down to a run of seconds."""
    real = load_config(REAL).to_dict()
    anchors = [anchor | dict(pretrained=None) for anchor in real["model"]["backbone"]["anchors"]]
    hooks = [dict(type="mmsnnet.StitchInitHook", num_images=2), dict(type="mmsnnet.ConsistencyHook", interval=EVERY)]
    loader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=str(data)))
    checkpoint = dict(interval=EVERY, max_keep_ckpts=-1)
    pipeline = [*real["train_dataloader"]["dataset"]["pipeline"], dict(type="Mortal")]
    changes: dict[str, Any] = dict(
        custom_imports=dict(imports=["mmsnnet", "trouble"]),
        model=dict(backbone=dict(anchors=anchors)),
        train_dataloader=dict(loader, batch_size=2, dataset=dict(loader["dataset"], pipeline=pipeline)),
        # Images alone in their batches have the same figures to the bit, whichever rank evaluates them.
        val_dataloader=dict(loader, batch_size=1),
        test_dataloader=dict(loader, batch_size=1),
        train_cfg=dict(max_iters=ITERATIONS, val_interval=10 * ITERATIONS),
        default_hooks=dict(checkpoint=checkpoint, logger=dict(interval=1)),
        custom_hooks=[*hooks, dict(type="Trouble")],
    )
    (runs.folder / "trouble.py").write_text(TROUBLE)
    path = runs.folder / "config.py"
    path.write_text("\n".join([f"_base_ = {str(REAL)!r}", *(f"{key} = {value!r}" for key, value in changes.items())]))
    return path


def steps(work: Path) -> list[int]:
    """The iterations that the last run in a work folder logged."""
    lines = max(work.glob("*/vis_data/scalars.json")).read_text().splitlines()
    return [entry["step"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture(scope="module")
def killed(runs: Runs, config: Path, work: Path) -> Ended:
    """A run by torchrun whose rank 1 was killed after ``BEFORE`` iterations."""
    return runs("dist_train.sh", config, 2, "--work-dir", work, TROUBLE="killed")


def test_two_processes_train_as_one_run(work: Path, killed: Ended) -> None:
    assert steps(work) == list(range(1, BEFORE + 1)), killed.said
    (log,) = (path.read_text() for path in work.glob("*/*.log"))
    assert "Distributed training: True" in log and "GPU number: 2" in log
    assert re.search(r"backend\W+gloo", log) and "2 ranks start alike" in log
    # torch's and mmengine's advice on threads.
    assert "OMP_NUM_THREADS" not in killed.said and "MKL_NUM_THREADS" not in killed.said


def test_a_killed_rank_ends_the_others_within_a_minute_and_is_named(work: Path, killed: Ended) -> None:
    assert killed.status != 0
    assert killed.time - float((work / "struck").read_text()) < 60
    assert "rank      : 1 " in killed.cause and "(SIGKILL)" in killed.cause
    # If the other rank reports its lost connection before torchrun ends it, it points to this one.
    lost = [line for line in killed.said.splitlines() if "gloo/transport" in line]
    assert all("another process of this run has ended" in line for line in lost)


@pytest.fixture(scope="module")
def resumed(runs: Runs, config: Path, work: Path, killed: Ended) -> Ended:
    """The killed run, gone on with under Slurm: two nodes of one task each."""
    slurm = dict(GPUS=2, GPUS_PER_NODE=1, SRUN_ARGS="--gres=none")
    return runs("slurm_train.sh", "partition", "name", config, "--work-dir", work, "--resume", **slurm)


def test_a_killed_run_goes_on_from_its_last_checkpoint(work: Path, resumed: Ended) -> None:
    assert resumed.status == 0, resumed.said
    assert steps(work) == list(range(BEFORE // EVERY * EVERY + 1, ITERATIONS + 1))
    last = torch.load(work / f"iter_{ITERATIONS}.pth", map_location="cpu", weights_only=False)
    assert int(last["state_dict"]["backbone.draws"]) == ITERATIONS


def test_two_processes_evaluate_as_one_does(
    runs: Runs, config: Path, work: Path, resumed: Ended, tmp_path: Path
) -> None:
    """And as one task of Slurm."""
    model = (config, work / f"iter_{ITERATIONS}.pth")
    options = ("--stitches", STITCHES, "--work-dir", tmp_path, "--out")
    one = runs("slurm_test.sh", "partition", "name", *model, *options, tmp_path / "one.json", GPUS=1)
    two = runs("dist_test.sh", *model, 2, *options, tmp_path / "two.json")
    for ended in (one, two):
        assert ended.status == 0 and ended.said.count("operating points: ") == 1, ended.said
    points, same = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert [point["name"] for point in points["stitches"]] == STITCHES.split(",")
    assert same == points


@pytest.fixture(scope="module")
def staged(data: Path, runs: Runs, run_two: Callable[..., None]) -> dict[int, Path]:
    """Work folders of a run of one process, and of one of two that get the same images each; by their number.

    A ResNet is joined to a Swin: batch norms, whose statistics are a rank's own, and windows. All images differ, but in
    the copies that two processes read each image is there twice, for each rank once.
    """
    for folder in ("images/training", "annotations/training"):
        (runs.folder / "twice" / folder).mkdir(parents=True)
        for path in sorted((data / folder).iterdir()):
            for copy in "ab":
                shutil.copy(path, runs.folder / "twice" / folder / f"{path.stem}{copy}{path.suffix}")
    real = load_config(STAGED).to_dict()
    anchors = [
        dict(model="resnet18", layers=(1, 1, 2, 1), channels=(8, 16, 24, 32)),
        dict(real["model"]["backbone"]["anchors"][1], pretrained=None, drop_path_rate=0.0),
    ]
    plain = ("mmsnnet.LoadImage", "mmsnnet.LoadSegLabels", "PackSegInputs")
    pipeline = [step for step in real["train_dataloader"]["dataset"]["pipeline"] if step["type"] in plain]
    loader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=str(data)))
    changes: dict[str, Any] = dict(
        model=dict(backbone=dict(anchors=anchors), decode_head=dict(init_cfg=None), auxiliary_head=dict(init_cfg=None)),
        train_dataloader=dict(
            loader,
            batch_size=2,
            sampler=dict(type="InfiniteSampler", shuffle=False),
            dataset=dict(loader["dataset"], pipeline=pipeline),
        ),
        val_dataloader=dict(loader, batch_size=1),
        test_dataloader=dict(loader, batch_size=1),
        train_cfg=dict(max_iters=EVERY, val_interval=10 * EVERY),
        default_hooks=dict(checkpoint=dict(interval=EVERY), logger=dict(interval=1)),
        custom_hooks=[dict(type="mmsnnet.ConsistencyHook", interval=1)],
        load_from=str(runs.folder / "start.pth"),
    )
    path = runs.folder / "staged.py"
    path.write_text("\n".join([f"_base_ = {str(STAGED)!r}", *(f"{key} = {value!r}" for key, value in changes.items())]))
    model = build_model(load_config(path))
    for layer in model.backbone.network.layers.values():
        layer.set_base(layer.weight, layer.bias)
    torch.save(dict(meta={}, state_dict=model.state_dict()), runs.folder / "start.pth")
    work = {number: runs.folder / f"staged {number}" for number in (1, 2)}
    twice = ("--cfg-options", f"train_dataloader.dataset.data_root={runs.folder / 'twice'}")
    ended = runs("train.py", path, "--work-dir", work[1])
    assert ended.status == 0, ended.said
    run_two("train.py", path, "--work-dir", work[2], *twice)
    return work


def test_two_processes_train_hierarchical_anchors_as_one_does(staged: dict[int, Path], runs: Runs) -> None:
    """To the bit, where both get the same images: half of a gradient twice is the gradient."""
    start, one, two = (
        torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
        for path in (runs.folder / "start.pth", *(work / f"iter_{EVERY}.pth" for work in staged.values()))
    )
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    moved = [name for name, value in one.items() if not torch.equal(value, start[name])]
    for part in ("anchors.0.", "anchors.1.", "layers.", "running_var", "downsample"):
        assert any(part in name for name in moved), part


def test_two_processes_evaluate_hierarchical_anchors_as_one_does(
    staged: dict[int, Path], runs: Runs, run_two: Callable[..., None], tmp_path: Path
) -> None:
    model = (runs.folder / "staged.py", staged[2] / f"iter_{EVERY}.pth")
    options = ("--stitches", "S,L,S2.0-L2.3,L1.1-S2.0", "--work-dir", tmp_path, "--out")
    ended = runs("test.py", *model, *options, tmp_path / "one.json")
    assert ended.status == 0, ended.said
    run_two("test.py", *model, *options, tmp_path / "two.json")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two and len(one["stitches"]) == 4


def test_a_loss_that_is_no_number_on_one_rank_ends_both_with_its_name(runs: Runs, config: Path, tmp_path: Path) -> None:
    ended = runs("dist_train.sh", config, 2, "--work-dir", tmp_path, TROUBLE="nan")
    assert ended.status != 0
    assert re.search(rf"traceback : \S+ is nan at iteration {BEFORE + 1} on rank 1, ", ended.cause)
    # Once, or only there if torchrun has ended rank 0 first, and without the traceback of a program's own error.
    errors = re.findall(r"^train.py: error: .* is nan", ended.said, re.MULTILINE)
    assert len(errors) == 1 or (errors == [] and "closing signal SIGTERM" in ended.said)
    assert "NotFiniteError" not in ended.said
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["iter_2.pth", "iter_4.pth"]


def test_a_data_loaders_worker_that_dies_ends_both_ranks(runs: Runs, config: Path, tmp_path: Path) -> None:
    worker = ("--cfg-options", "train_dataloader.num_workers=1")
    ended = runs("dist_train.sh", config, 2, "--work-dir", tmp_path, *worker, TROUBLE="worker")
    assert ended.status != 0
    assert "rank      : 1 " in ended.cause and re.search(r"DataLoader worker .* (exited|killed)", ended.cause)


def test_a_folder_that_cannot_be_written_to_ends_both_ranks_with_one_message(
    runs: Runs, config: Path, tmp_path: Path
) -> None:
    """Before anything is trained."""
    (tmp_path / "file").touch()
    out = ("--cfg-options", f"default_hooks.checkpoint.out_dir={tmp_path / 'file'}")
    ended = runs("dist_train.sh", config, 2, "--work-dir", tmp_path / "work", *out)
    assert ended.status != 0 and "Iter(train)" not in ended.said
    assert f"{tmp_path / 'file' / 'work'} cannot be written" in ended.cause
    # Once, or only there if torchrun has ended rank 0 first.
    errors = re.findall(r"^train.py: error: (.*)$", ended.said, re.MULTILINE)
    assert len(errors) == 1 or (errors == [] and "closing signal SIGTERM" in ended.said)
    assert all(error in ended.cause for error in errors)


CONFIG = ("config.py",)
CHECKPOINT = ("config.py", "model.pth")


@pytest.mark.parametrize(
    ("tool", "arguments", "variables", "expected"),
    [
        ("dist_train.sh", (*CONFIG, 8), {}, "--standalone .*--nproc-per-node=8"),
        ("dist_train.sh", (*CONFIG, 8), dict(PORT=29511), "--master-port=29511 .*--nproc-per-node=8"),
        (
            "dist_test.sh",
            (*CHECKPOINT, 8),
            dict(NNODES=2, NODE_RANK=1, MASTER_ADDR="node1"),
            "--nnodes=2 --node-rank=1 --master-addr=node1 --master-port=29500 .*--nproc-per-node=8",
        ),
        ("slurm_train.sh", ("p", "n", *CONFIG), {}, "--gres=gpu:8 --ntasks=8 --ntasks-per-node=8 --cpus-per-task=5 "),
        (
            "slurm_test.sh",
            ("p", "n", *CHECKPOINT),
            dict(GPUS=16, GPUS_PER_NODE=4, CPUS_PER_TASK=2, SRUN_ARGS="--qos=long --mem=8G"),
            "--gres=gpu:4 --ntasks=16 --ntasks-per-node=4 --cpus-per-task=2 .*--qos=long --mem=8G python",
        ),
        # Fewer than a whole node.
        ("slurm_train.sh", ("p", "n", *CONFIG), dict(GPUS=2), "--gres=gpu:2 --ntasks=2 --ntasks-per-node=2 "),
    ],
)
def test_what_the_scripts_ask_their_launchers_for(
    tmp_path: Path, tool: str, arguments: tuple[object, ...], variables: Mapping[str, object], expected: str
) -> None:
    (tmp_path / "config.py").touch()
    ended = Runs(tmp_path, "python", "srun")(tool, *arguments, "--cfg-options", "a=b c", **variables)
    launcher, kind = ("srun", "slurm") if tool.startswith("slurm") else ("python", "pytorch")
    files = " ".join(map(str, (value for value in arguments if str(value).endswith((".py", ".pth")))))
    assert ended.status == 0
    called = rf"{launcher} .*{expected}.*/tools/(train|test)\.py {files} --launcher {kind} --cfg-options a=b c\n"
    assert re.fullmatch(called, ended.said), ended.said


NODES = dict(NNODES=2, MASTER_ADDR="node1")


@pytest.mark.parametrize(
    ("tool", "arguments", "variables", "message"),
    [
        ("dist_train.sh", (), {}, "CONFIG is missing"),
        ("dist_train.sh", CONFIG, {}, "GPUS is missing"),
        ("dist_test.sh", CONFIG, {}, "CHECKPOINT is missing"),
        ("dist_test.sh", CHECKPOINT, {}, "GPUS is missing"),
        ("dist_train.sh", ("nowhere.py", 8), {}, "there is no config 'nowhere.py'"),
        ("dist_test.sh", ("bin", "model.pth", 8), {}, "there is no config 'bin'"),
        ("dist_train.sh", (*CONFIG, "--resume"), {}, "GPUS is .*, got '--resume'"),
        ("dist_test.sh", (*CONFIG, 8, "--resume"), {}, "GPUS is .*, got '--resume'"),
        *(
            ("dist_train.sh", (*CONFIG, gpus), {}, f"GPUS is .*, got '{gpus}'")
            for gpus in (0, -1, "two", "2x", "", "08")
        ),
        ("dist_train.sh", (*CONFIG, 8), dict(NODES, NNODES="two"), "NNODES is .*, got 'two'"),
        ("dist_train.sh", (*CONFIG, 8), dict(NODES, NNODES=0), "NNODES is .*, got '0'"),
        ("dist_train.sh", (*CONFIG, 8), NODES, "NODE_RANK, .* is missing"),
        ("dist_train.sh", (*CONFIG, 8), dict(NODES, NODE_RANK=2), "from 0 to .* 1, got '2'"),
        ("dist_train.sh", (*CONFIG, 8), dict(NODES, NODE_RANK=-1), "from 0 to .* 1, got '-1'"),
        # NNODES was forgotten: each node would train alone.
        ("dist_train.sh", (*CONFIG, 8), dict(NODE_RANK=1), "from 0 to .* 0, got '1'"),
        ("dist_train.sh", (*CONFIG, 8), dict(NNODES=2, NODE_RANK=0), "MASTER_ADDR, .* is missing"),
        ("slurm_train.sh", (), {}, "PARTITION is missing"),
        ("slurm_train.sh", ("p",), {}, "JOB_NAME is missing"),
        ("slurm_test.sh", ("p", "n"), {}, "CONFIG is missing"),
        ("slurm_test.sh", ("p", "n", *CONFIG), {}, "CHECKPOINT is missing"),
        ("slurm_train.sh", ("p", "n", "nowhere.py"), {}, "there is no config 'nowhere.py'"),
        ("slurm_train.sh", ("p", "n", *CONFIG), dict(GPUS="two"), "GPUS is .*, got 'two'"),
        ("slurm_train.sh", ("p", "n", *CONFIG), dict(GPUS_PER_NODE=0), "GPUS_PER_NODE is .*, got '0'"),
        ("slurm_train.sh", ("p", "n", *CONFIG), dict(CPUS_PER_TASK="x"), "CPUS_PER_TASK is .*, got 'x'"),
    ],
)
def test_what_the_scripts_refuse_before_anything_starts(
    tmp_path: Path, tool: str, arguments: tuple[object, ...], variables: Mapping[str, object], message: str
) -> None:
    (tmp_path / "config.py").touch()
    ended = Runs(tmp_path, "python", "srun")(tool, *arguments, **variables)
    usage, *_, last = ended.said.splitlines()
    assert ended.status == 2 and re.match(r"Usage: .*(tools/|GPUS=8)", usage), ended.said
    assert re.match(f"{tool}: error: .*{message}", last), last
    assert ended.said.count("error") == 1 and not re.search("^(python|srun|bash)", ended.said, re.MULTILINE)


@pytest.mark.parametrize("tool", ["dist_train.sh", "dist_test.sh", "slurm_train.sh", "slurm_test.sh"])
def test_the_scripts_help_is_the_comment_at_their_top(tmp_path: Path, tool: str) -> None:
    ended = Runs(tmp_path, "python", "srun")(tool, "--help")
    _, *lines = (REPOSITORY / "tools" / tool).read_text().partition("\nsource ")[0].splitlines()
    assert ended.status == 2 and ended.said.splitlines() == [line.removeprefix("# ") for line in lines]
    assert f"bash tools/{tool} " in ended.said


def test_without_slurm_its_scripts_say_so(tmp_path: Path) -> None:
    (tmp_path / "config.py").touch()
    runs = Runs(tmp_path)
    (tmp_path / "bin/srun").unlink()
    ended = runs("slurm_train.sh", "p", "n", *CONFIG)
    assert ended.status == 2 and "srun is not on the PATH" in ended.said.splitlines()[-1]
