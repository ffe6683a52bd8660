"""What a process reads from its launcher, what it changes in a config, and which rank prints an error."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_distributed
from torch import distributed, nn

from mmsnnet.cli import launching as launch
from mmsnnet.cli.arguments import DistributedParser
from mmsnnet.cli.errors import exit_on_user_error
from mmsnnet.cli.launching import (
    LostConnectionError,
    Process,
    check_data_parallel,
    check_sync_bn,
    prepare_launch,
    process_group,
)

PREFIXES = ("SLURM_", "TORCHELASTIC_", "MASTER_", "GLOO_")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
Environment = Callable[..., None]


@pytest.fixture
def environment() -> Iterator[Environment]:
    """``environment(**variables)`` sets these variables of launchers and no others, until the test ends."""

    def choose(**variables: object) -> None:
        for name in [name for name in os.environ if name.startswith(PREFIXES) or name in NAMES]:
            del os.environ[name]
        os.environ.update({name: str(value) for name, value in variables.items()})

    before = dict(os.environ)
    choose()
    yield choose
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a GPU. The process group of a test ends with it."""
    monkeypatch.setattr(launch, "get_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def one_process() -> dict[str, object]:
    """The variables of torchrun for a run of one process; rank 0 listens on any free port."""
    ranks = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    return ranks | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=0)


def slurm(rank: int = 3, nodes: int = 2, **others: object) -> dict[str, object]:
    """The variables of srun for one of four tasks."""
    ranks = dict(SLURM_PROCID=rank, SLURM_STEP_NUM_TASKS=4, SLURM_LOCALID=rank % (4 // nodes))
    return ranks | dict(SLURM_STEP_NUM_NODES=nodes, SLURM_STEP_NODELIST="node[1-2]") | others


@pytest.mark.parametrize(
    ("launcher", "variables", "expected"),
    [
        ("pytorch", dict(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4), Process(5, 8, 1, 4)),
        ("pytorch", dict(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1), Process(5, 8, 1, None)),
        ("slurm", slurm(), Process(3, 4, 1, None)),
        ("slurm", slurm(nodes=1), Process(3, 4, 3, 4)),
        # The job is larger than the step.
        ("slurm", slurm(SLURM_NTASKS=16), Process(3, 4, 1, None)),
    ],
)
def test_a_process_reads_its_ranks(
    environment: Environment, launcher: str, variables: Mapping[str, object], expected: Process
) -> None:
    environment(**variables)
    process = Process.from_environment(launcher)
    assert process == expected
    assert process.on_one_machine == (expected.local_world_size == expected.world_size)


@pytest.mark.parametrize(
    ("launcher", "variables", "cure"),
    [
        ("pytorch", {}, "tools/dist_train.sh"),
        ("pytorch", dict(RANK=0, WORLD_SIZE=2), "LOCAL_RANK, which torchrun sets"),
        ("slurm", {}, "tools/slurm_train.sh"),
        # A batch script that calls Python without srun is one process, which would wait for the others forever.
        ("slurm", dict(SLURM_PROCID=0, SLURM_NTASKS=8, SLURM_LOCALID=0), "SLURM_STEP_NUM_TASKS, which srun sets"),
    ],
)
def test_a_process_that_its_launcher_has_not_started(
    environment: Environment, launcher: str, variables: Mapping[str, object], cure: str
) -> None:
    environment(**variables)
    with pytest.raises(ValueError, match=f"--launcher {launcher} .*{cure}"):
        prepare_launch(Config({}), launcher)


def test_torchrun_without_a_launcher_is_refused(environment: Environment) -> None:
    """Each process would train alone, over the other's files."""
    environment(TORCHELASTIC_RUN_ID="none", RANK=1, WORLD_SIZE=2)
    with pytest.raises(ValueError, match="--launcher pytorch"):
        prepare_launch(Config({}), "none")
    # The variables of a container do not come from torchrun.
    environment(RANK=1, WORLD_SIZE=2)
    prepare_launch(Config({}), "none")


@pytest.fixture
def scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for Slurm's scontrol, the only program on the PATH."""
    path = tmp_path / "bin/scontrol"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && echo node1 && echo node2\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    return path


def test_slurm_gives_the_address_of_rank_0(environment: Environment, scontrol: Path) -> None:
    rows = []
    for job, step, rank in ((7, 0, 0), (7, 0, 3), (7, 1, 0), (8, 0, 0)):
        environment(**slurm(rank, SLURM_JOB_ID=job, SLURM_STEP_ID=step))
        Process.from_environment("slurm").set_torch_variables()
        rows.append([os.environ[name] for name in (*NAMES[:3], "MASTER_ADDR", "MASTER_PORT")])
    ranks, hosts, ports = ([row[:3] for row in rows], {row[3] for row in rows}, [row[4] for row in rows])
    assert ranks[:2] == [["0", "4", "0"], ["3", "4", "1"]] and hosts == {"node1"}
    # All tasks of a step have the same port; other steps and jobs on the machine have another one.
    assert ports[0] == ports[1] and len(set(ports)) == 3 and all(1024 < int(port) < 32768 for port in ports)


def test_variables_of_the_user_take_precedence(environment: Environment, scontrol: Path) -> None:
    environment(**slurm(MASTER_ADDR="10.0.0.1", MASTER_PORT=1234))
    Process.from_environment("slurm").set_torch_variables(port=5678)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "1234")
    environment(**slurm())
    Process.from_environment("slurm").set_torch_variables(port=5678)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node1", "5678")


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 1\n"])
def test_without_scontrol_several_nodes_need_an_address(
    environment: Environment, scontrol: Path, script: str | None
) -> None:
    """In a container, for example. One node needs none."""
    scontrol.unlink() if script is None else scontrol.write_text(script)
    environment(**slurm(nodes=1))
    Process.from_environment("slurm").set_torch_variables()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    environment(**slurm(nodes=2))
    with pytest.raises(ValueError, match=r"set MASTER_ADDR .*scontrol"):
        Process.from_environment("slurm").set_torch_variables()


@pytest.mark.parametrize("timeout", [None, 77, 77.5])
def test_without_a_gpu_the_group_is_gloo_with_the_timeout_of_the_config(
    environment: Environment, on_cpu: None, timeout: float | None
) -> None:
    environment(**one_process())
    settings: dict[str, Any] = dict(backend="nccl") | ({} if timeout is None else dict(timeout=timeout))
    config = Config(dict(env_cfg=dict(dist_cfg=settings)))
    prepare_launch(config, "pytorch")
    assert distributed.get_backend() == "gloo" == config.env_cfg.dist_cfg.backend and get_world_size() == 1
    gloo = distributed.group.WORLD._get_backend(torch.device("cpu"))
    assert gloo.options._timeout == timedelta(seconds=timeout or 1800)
    # All are on this machine: its name need not lead anywhere.
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")


@pytest.mark.parametrize("timeout", ["30", 0, -1, True])
def test_a_wrong_timeout(environment: Environment, on_cpu: None, timeout: object) -> None:
    environment(**one_process())
    with pytest.raises(ValueError, match="timeout is a positive number of seconds"):
        prepare_launch(Config(dict(env_cfg=dict(dist_cfg=dict(timeout=timeout)))), "pytorch")


def test_slurm_becomes_torchs_launcher(environment: Environment, on_cpu: None) -> None:
    environment(SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=1, SLURM_LOCALID=0, SLURM_STEP_NUM_NODES=1)
    config = Config(dict(env_cfg=dict(dist_cfg=dict(backend="nccl", port=0))))
    prepare_launch(config, "slurm")
    assert config.launcher == "pytorch" and config.env_cfg.dist_cfg == dict(backend="gloo")
    assert is_distributed()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # mmengine's default, without the GPU.
        (
            dict(find_unused_parameters=True),
            dict(type="MMDistributedDataParallel", broadcast_buffers=False, find_unused_parameters=True),
        ),
        (dict(model_wrapper_cfg=dict(static_graph=True)), dict(type="MMDistributedDataParallel", static_graph=True)),
        (
            dict(model_wrapper_cfg=dict(type="MMSeparateDistributedDataParallel", device_ids=[0])),
            dict(type="MMSeparateDistributedDataParallel"),
        ),
    ],
)
def test_data_parallelism_on_cpus_has_no_gpus(
    environment: Environment, on_cpu: None, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    environment(**one_process())
    config = Config(settings)
    prepare_launch(config, "pytorch")
    assert config.model_wrapper_cfg == expected | dict(device_ids=None)


def test_other_wrappers_are_not_changed(environment: Environment, on_cpu: None) -> None:
    environment(**one_process())
    config = Config(dict(model_wrapper_cfg=dict(type="MMFullyShardedDataParallel")))
    prepare_launch(config, "pytorch")
    assert config.model_wrapper_cfg == dict(type="MMFullyShardedDataParallel")


UNUSED = dict(find_unused_parameters=True)
OURS = dict(type="mmsnnet.StitchedDataParallel")


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, True),
        (dict(model_wrapper_cfg=dict(type="MMDistributedDataParallel", broadcast_buffers=False)), True),
        (dict(model_wrapper_cfg=dict(type="MMSeparateDistributedDataParallel")), True),
        # The wrapper's setting takes precedence.
        (dict(model_wrapper_cfg=dict(type="MMDistributedDataParallel"), **UNUSED), True),
        (UNUSED, False),
        (dict(model_wrapper_cfg=dict(type="MMDistributedDataParallel", **UNUSED)), False),
        (dict(model_wrapper_cfg=OURS), False),
        (dict(runner_type="FlexibleRunner"), False),
    ],
)
def test_data_parallelism_that_waits_for_unused_parameters(
    make_backbone: Callable[..., nn.Module], settings: dict[str, Any], refused: bool
) -> None:
    config = Config(settings)
    model = nn.Sequential(make_backbone(initialized=False))
    for launcher in ("pytorch", "slurm"):
        with pytest.raises(ValueError, match=r"mmsnnet\.StitchedDataParallel") if refused else nullcontext():
            check_data_parallel(config, launcher, model)
    check_data_parallel(config, "none", model)
    check_data_parallel(config, "pytorch", nn.Linear(1, 1))
    if refused:
        config.model_wrapper_cfg = OURS
        check_data_parallel(config, "pytorch", model)  # the message names this setting


@pytest.mark.parametrize(("local_rank", "local_world_size"), [(0, 4), (3, 4), (2, None)])
def test_more_processes_than_gpus(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, local_rank: int, local_world_size: int | None
) -> None:
    """Every rank that can know it refuses, before it takes a GPU."""
    monkeypatch.setattr(launch, "get_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    here = {} if local_world_size is None else dict(LOCAL_WORLD_SIZE=local_world_size)
    environment(RANK=local_rank, WORLD_SIZE=4, LOCAL_RANK=local_rank, **here)
    with pytest.raises(ValueError, match=r"each sees 2 GPUs: .*CUDA_VISIBLE_DEVICES"):
        prepare_launch(Config({}), "pytorch")
    environment(RANK=0, WORLD_SIZE=4, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    config = Config(dict(model_wrapper_cfg=dict(type="MMDistributedDataParallel")))
    prepare_launch(config, "pytorch")
    # mmengine starts the group and chooses the GPU of a rank.
    assert not is_distributed() and config.model_wrapper_cfg == dict(type="MMDistributedDataParallel")


def test_synchronised_batch_norms_are_refused_on_cpus(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = dict(type="SyncBN", requires_grad=True)
    heads = [dict(norm_cfg=dict(type="MMSyncBN")), dict(norm_cfg=dict(type="BN"))]
    config = Config(dict(model=dict(decode_head=dict(norm_cfg=norm), auxiliary_head=heads), sync_bn="torch"))
    cure = "--cfg-options model.decode_head.norm_cfg.type=BN model.auxiliary_head.0.norm_cfg.type=BN sync_bn=None"
    with pytest.raises(ValueError, match=f"{cure}$"):
        check_sync_bn(config, "pytorch")
    # The settings of the message are accepted.
    config.merge_from_dict(dict(option.split("=") for option in cure.split()[1:]) | dict(sync_bn=None))
    check_sync_bn(config, "pytorch")
    config.model.decode_head.norm_cfg.type = "SyncBN"
    check_sync_bn(config, "none")  # mmengine makes BN of it
    monkeypatch.setattr(launch, "get_device", lambda: "cuda")
    check_sync_bn(config, "pytorch")


def error_lines(environment: Environment, capsys: pytest.CaptureFixture[str], **variables: object) -> list[str]:
    """What a process with these variables prints about a mistake."""
    environment(**variables)
    with pytest.raises(SystemExit, match="2"):
        DistributedParser(prog="tool").error("no such thing")
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("variables", [{}, dict(RANK=0), dict(SLURM_PROCID=0)])
def test_rank_0_prints_a_mistake(
    environment: Environment, capsys: pytest.CaptureFixture[str], variables: Mapping[str, object]
) -> None:
    assert error_lines(environment, capsys, **variables)[-1] == "tool: error: no such thing"


def test_other_ranks_leave_it_to_torchruns_summary(
    environment: Environment, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    for rank in (0, 3):
        file = tmp_path / f"{rank}.json"
        lines = error_lines(environment, capsys, RANK=rank, TORCHELASTIC_ERROR_FILE=file)
        assert bool(lines) is (rank == 0)
        assert json.loads(file.read_text())["message"]["message"] == "no such thing"
        failure = ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(file))
        assert "traceback : no such thing" in str(ChildFailedError("tool", {rank: failure}))


def test_a_lost_connection_is_not_torchruns_cause(environment: Environment, tmp_path: Path) -> None:
    """Not even if torchrun notices the end of the other rank after it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    environment(RANK=0, TORCHELASTIC_ERROR_FILE=tmp_path / "0.json")
    parser = DistributedParser(prog="tool")
    with pytest.raises(SystemExit), exit_on_user_error(parser), process_group():
        raise RuntimeError("gloo/transport/tcp/pair.cc:538] Connection reset")
    lost = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "0.json"))
    killed = ProcessFailure(local_rank=1, pid=2, exitcode=-9, error_file="none")
    assert ChildFailedError("tool", {0: lost, 1: killed}).get_first_failure() == (1, killed)


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
def test_other_ranks_print_their_number_where_there_is_no_summary(
    environment: Environment, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert error_lines(environment, capsys, **{name: 3})[-1] == "tool: error: rank 3: no such thing"


def test_a_lost_connection_points_to_the_other_process() -> None:
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:58057: Connection reset"
    for error in (RuntimeError(lost), distributed.DistBackendError("NCCL error: remote process exited")):
        with pytest.raises(LostConnectionError, match="another process of this run") as raised, process_group():
            raise error
        assert raised.value.__cause__ is error and str(error) in str(raised.value)
    others = [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ValueError("gloo/transport"),
        distributed.DistNetworkError("failed to listen, name: EADDRINUSE, message: address already in use"),
    ]
    for error in others:
        with pytest.raises(type(error)) as raised, process_group():
            raise error
        assert raised.value is error


def test_the_group_ends_with_the_work(environment: Environment, on_cpu: None) -> None:
    environment(**one_process())
    with process_group():
        prepare_launch(Config({}), "pytorch")
        assert is_distributed()
    assert not is_distributed()


def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    """A launcher that is killed cannot end them."""
    code = (
        "import os, pathlib, sys, time; from mmengine.config import Config; from mmsnnet.cli import launching;"
        "launching.prepare_launch(Config(), 'none'); pathlib.Path(sys.argv[1]).write_text('.'); time.sleep(60)"
    )
    rank = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    variables = dict(os.environ, TORCHELASTIC_RUN_ID="1", RANK="0", WORLD_SIZE="1")
    launcher = subprocess.Popen(
        [sys.executable, "-c", rank, code, str(tmp_path / "pid")], env=variables, stderr=subprocess.PIPE, text=True
    )
    while launcher.poll() is None and not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        time.sleep(0.1)
    launcher.kill()
    assert f"the launcher, process {launcher.pid}, has ended" in launcher.communicate(timeout=60)[1]
