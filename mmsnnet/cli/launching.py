from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.registry import MODEL_WRAPPERS
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mmsnnet.models import StitchedBackbone

# By launcher, what starts its processes, and how.
STARTED_BY = {
    "pytorch": ("torchrun", "bash tools/dist_train.sh CONFIG GPUS, or tools/dist_test.sh"),
    "slurm": ("srun", "bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG, or tools/slurm_test.sh"),
    "mpi": ("mpirun", "mpirun -np GPUS python tools/train.py CONFIG --launcher mpi"),
}
# By launcher, what it calls the rank of a process, the number of processes, and the rank on the machine. A Slurm job
# has SLURM_NTASKS in its batch script, too, which is one process; the step's number is there where srun started it.
RANKS = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
# Seconds that a rank with nothing new to say leaves to another to end with the cause, whereupon the launcher ends all.
HEAD_START = 10


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Args:
        rank: its number among all.
        world_size: how many there are.
        local_rank: its number among those of its machine, which is that of its GPU, too.
        local_world_size: how many there are on its machine; ``None`` where the launcher does not say.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None

    @classmethod
    def started_by(cls, launcher: str) -> Process:
        """This process, by what its launcher (``pytorch``, ``slurm`` or ``mpi``) has put into the environment.

        Raises:
            ValueError: the launcher has not started this process.
        """
        missing = [name for name in RANKS[launcher] if not os.environ.get(name, "").isdecimal()]
        if missing:
            starter, command = STARTED_BY[launcher]
            raise ValueError(
                f"--launcher {launcher} is for processes that {starter} has started, which sets {', '.join(missing)}: "
                f"{command}; one process alone needs no --launcher"
            )
        rank, world_size, local_rank = (int(os.environ[name]) for name in RANKS[launcher])
        if launcher == "slurm":
            local_world_size = world_size if os.environ.get("SLURM_STEP_NUM_NODES") == "1" else None
        else:
            name = "LOCAL_WORLD_SIZE" if launcher == "pytorch" else "OMPI_COMM_WORLD_LOCAL_SIZE"
            local_world_size = int(os.environ[name]) if name in os.environ else None
        return cls(rank, world_size, local_rank, local_world_size)

    @property
    def is_beside_all_others(self) -> bool:
        """Whether the launcher says that all processes are on this machine."""
        return self.local_world_size == self.world_size

    def introduce(self, launcher: str, port: int | None = None) -> None:
        """Says in torch's environment variables what another launcher has said in its own: who this process is, and
        where rank 0 listens.

        Args:
            launcher: ``slurm`` or ``mpi``.
            port: of rank 0 where ``MASTER_PORT`` is not set; by default one that follows from the numbers of Slurm's
                job and step, so that two jobs on one machine do not meet, or else torch's 29500.

        Raises:
            ValueError: the machine of rank 0 is not known.
        """
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK=str(self.local_rank))
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = "127.0.0.1" if self.is_beside_all_others else _first_machine(launcher)
        if port is None and launcher == "slurm":
            # Below the ports that systems give to connections of their own.
            job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
            port = 15000 + (17 * job + step) % 15000
        os.environ.setdefault("MASTER_PORT", str(port or 29500))


def _first_machine(launcher: str) -> str:
    """The name of the machine on which rank 0 is: the first in Slurm's list."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
    if launcher == "slurm" and nodes and shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.split():
            return done.stdout.split()[0]
    raise ValueError(
        "where rank 0 listens cannot be found out: set MASTER_ADDR to the name or address of its machine"
        + (" (scontrol, which would say it, is missing or fails)" if launcher == "slurm" else "")
    )


def prepare_launch(config: Config, launcher: str) -> None:
    """Makes ready what a runner of ``launcher`` needs; to be called before it is built.

    What Slurm and MPI call the processes is put into torch's variables, and ``config.launcher`` becomes ``pytorch``.
    mmengine starts process groups for GPUs only. Without a GPU (or with ``CUDA_VISIBLE_DEVICES=-1``) the group is
    started here, with gloo and ``env_cfg.dist_cfg.timeout`` (in seconds), and a ``DistributedDataParallel`` is told
    that it has none.

    Args:
        config: is changed.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.

    Raises:
        ValueError: the launcher has not started this process, or has started more processes than there are GPUs;
            there is no launcher and torchrun has started several processes.
    """
    config.launcher = launcher
    if launcher == "none":
        if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"torchrun has started {os.environ['WORLD_SIZE']} processes, and without --launcher pytorch each is a "
                "run of its own, in the same work folder"
            )
        return
    if not is_distributed():
        process = Process.started_by(launcher)
        distribution = config.setdefault("env_cfg", {}).setdefault("dist_cfg", {})
        port = distribution.pop("port", None)
        if launcher != "pytorch":
            process.introduce(launcher, port)
            config.launcher = "pytorch"
        if torch.cuda.is_available():
            _check_gpus(process)
        if get_device() == "cpu":
            _start_gloo(process, distribution)
    if get_device() == "cpu":
        _keep_off_gpus(config)


def _check_gpus(process: Process) -> None:
    gpus = torch.cuda.device_count()
    needed = process.local_world_size or process.local_rank + 1
    if needed > gpus:
        raise ValueError(
            f"this machine has {needed} processes or more and shows each {gpus} GPU{'s' * (gpus != 1)}: start one for "
            "each GPU, with all GPUs of the machine visible to all (CUDA_VISIBLE_DEVICES; for srun --gres=gpu:N in "
            "place of --gpus-per-task); CUDA_VISIBLE_DEVICES=-1 is for CPUs"
        )


def _start_gloo(process: Process, distribution: Mapping[str, Any]) -> None:
    """Starts the process group; ``distribution`` is ``env_cfg.dist_cfg``."""
    distribution["backend"] = "gloo"
    # By itself gloo listens where the machine's name leads to, which may be nowhere.
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if process.is_beside_all_others and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    timeout = distribution.get("timeout")
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
            raise ValueError(f"env_cfg.dist_cfg.timeout is in seconds, got {timeout!r}")
        timeout = timedelta(seconds=timeout)
    distributed.init_process_group("gloo", timeout=timeout)


def _keep_off_gpus(config: Config) -> None:
    """mmengine gives a ``DistributedDataParallel`` the GPU of its rank, be there one or not, unless the config says
    ``device_ids``."""
    if (wrapper := _data_parallel(config)) is not None:
        wrapper["device_ids"] = None
        config.model_wrapper_cfg = wrapper


def check_data_parallel(config: Config, launcher: str, model: nn.Module) -> None:
    """Refuses to train a stitched model in several processes by a ``DistributedDataParallel`` that waits for the
    gradients of all parameters: a stitch uses some, and torch finds that out in the second iteration.

    Args:
        model: of the config, with or without weights.

    Raises:
        ValueError: names the wrapper to set.
    """
    if launcher == "none" or (wrapper := _data_parallel(config)) is None or wrapper.get("find_unused_parameters"):
        return
    if any(isinstance(module, StitchedBackbone) and len(module.space) > 1 for module in model.modules()):
        raise ValueError(
            f"{wrapper['type']} waits for gradients that the drawn stitch does not have: set "
            "model_wrapper_cfg=dict(type='mmsnnet.StitchedDataParallel') in the config, or, which is slower, "
            "find_unused_parameters=True of the wrapper"
        )


def _data_parallel(config: Config) -> dict[str, Any] | None:
    """The settings of the ``DistributedDataParallel`` that mmengine puts around the model, if it is one."""
    if config.get("runner_type", "Runner") != "Runner":
        return None
    wrapper = config.get("model_wrapper_cfg")
    if wrapper is None:
        # What mmengine does without this setting.
        wrapper = dict(broadcast_buffers=False, find_unused_parameters=config.get("find_unused_parameters", False))
    wrapper.setdefault("type", "MMDistributedDataParallel")
    kind = MODEL_WRAPPERS.get(wrapper["type"]) if isinstance(wrapper["type"], str) else wrapper["type"]
    return wrapper if isinstance(kind, type) and issubclass(kind, DistributedDataParallel) else None


def check_sync_bn(config: Config, launcher: str) -> None:
    """Refuses to train synchronised batch norms on CPUs, which torch finds out in the first iteration.

    Raises:
        ValueError: names the settings to change.
    """
    if launcher == "none" or get_device() != "cpu":
        return
    settings = [f"{setting}.type=BN" for setting in _sync_bns(config.get("model"), "model")]
    settings += ["sync_bn=None"] * (config.get("sync_bn") is not None)
    if settings:
        raise ValueError(
            "batch norms that are synchronised over processes train on GPUs alone; without a GPU use one process, or "
            f"--cfg-options {' '.join(settings)}"
        )


def _sync_bns(setting: Any, path: str) -> Iterator[str]:
    """Where below a setting there are synchronised batch norms, as dotted keys."""
    if isinstance(setting, Mapping):
        if setting.get("type") in ("SyncBN", "MMSyncBN"):
            yield path
        for key, inner in setting.items():
            yield from _sync_bns(inner, f"{path}.{key}")
    elif isinstance(setting, list | tuple):
        for index, inner in enumerate(setting):
            yield from _sync_bns(inner, f"{path}.{index}")


@contextmanager
def launched() -> Iterator[None]:
    """Around what a tool does as one of several processes: ends their group once all are done.

    Where one of them ends before, the others lose their connection to it. They leave it to that one to say why.

    Raises:
        RuntimeError: the connection was lost, and the launcher has not ended this process since: the other is on
            another machine.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo/transport" in str(error)
        if not lost or "EADDRINUSE" in str(error):  # rank 0 alone finds that its port is taken
            raise
        time.sleep(HEAD_START)
        raise RuntimeError(
            "another process of this run has ended or cannot be reached: what it said on its machine is the cause; "
            f"here it was {' '.join(str(error).split())}"
        ) from error
    if is_distributed():
        distributed.destroy_process_group()
