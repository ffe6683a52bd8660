"""Runs of several processes: what a launcher sets, what mmengine and torch need, settings that cannot work."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
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

from mmsnnet.errors import SettingError, UserError
from mmsnnet.models import StitchedBackbone

# The variables in which a launcher gives a process its rank, the number of processes, and the rank on its machine.
# Slurm sets SLURM_NTASKS in a batch script, too, which is one process; only srun sets the step's number.
VARIABLES = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
STARTERS = {
    "pytorch": ("torchrun", "bash tools/dist_train.sh CONFIG GPUS, or tools/dist_test.sh"),
    "slurm": ("srun", "bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG, or tools/slurm_test.sh"),
}


class LostConnectionError(UserError, RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Args:
        rank: its number among all.
        world_size: the number of processes.
        local_rank: its number among the processes of its machine, and the number of its GPU.
        local_world_size: the number of processes on its machine; ``None`` if the launcher does not tell.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None

    @classmethod
    def from_environment(cls, launcher: str) -> Process:
        """This process, from the variables that ``pytorch`` or ``slurm`` sets.

        Raises:
            SettingError: the launcher has not started this process.
        """
        names = VARIABLES[launcher]
        if missing := [name for name in names if not os.environ.get(name, "").isdecimal()]:
            starter, command = STARTERS[launcher]
            raise SettingError(
                f"--launcher {launcher} needs {', '.join(missing)}, which {starter} sets: start the processes by "
                f"{command}; one process alone needs no --launcher"
            )
        rank, world_size, local_rank = (int(os.environ[name]) for name in names)
        local_world_size = None
        if launcher == "pytorch" and "LOCAL_WORLD_SIZE" in os.environ:
            local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
        if launcher == "slurm" and os.environ.get("SLURM_STEP_NUM_NODES") == "1":
            local_world_size = world_size
        return cls(rank, world_size, local_rank, local_world_size)

    @property
    def on_one_machine(self) -> bool:
        """Whether the launcher tells that all processes are on this machine."""
        return self.local_world_size == self.world_size

    def set_torch_variables(self, port: int | None = None) -> None:
        """Set torch's variables for a process of Slurm: its ranks, and the address of rank 0.

        Args:
            port: of rank 0, unless ``MASTER_PORT`` is set. The default follows from the numbers of Slurm's job and
                step, so that two jobs on one machine have different ones.

        Raises:
            SettingError: the machine of rank 0 is unknown.
        """
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK=str(self.local_rank))
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = "127.0.0.1" if self.on_one_machine else _first_machine()
        # Below 32768, where systems begin to assign ports to outgoing connections.
        job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ.setdefault("MASTER_PORT", str(port or 15000 + (17 * job + step) % 15000))


def _first_machine() -> str:
    """The name of the machine of rank 0: the first in Slurm's list."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
    if nodes and shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.split():
            return done.stdout.split()[0]
    raise SettingError(
        "set MASTER_ADDR to the name or address of the machine of rank 0: scontrol, which lists Slurm's machines, is "
        "missing or fails"
    )


def _end_with_launcher(launcher: int) -> None:
    """End this process when its parent, the launcher, has ended."""
    while os.getppid() == launcher:
        time.sleep(1)
    if os.environ["RANK"] == "0":
        print(f"error: the launcher, process {launcher}, has ended, and this run with it", file=sys.stderr, flush=True)
    os._exit(1)


def prepare_launch(config: Config, launcher: str) -> None:
    """Prepare this process for a runner of ``launcher``, before the runner is built.

    Slurm's variables are copied to torch's, and ``config.launcher`` becomes ``pytorch``. mmengine starts process groups
    for GPUs only. Without a GPU (or with ``CUDA_VISIBLE_DEVICES=-1``) this starts one with gloo and
    ``env_cfg.dist_cfg.timeout`` (in seconds), and sets ``device_ids=None`` of a ``DistributedDataParallel``.

    Args:
        config: is changed.
        launcher: ``none``, ``pytorch`` or ``slurm``.

    Raises:
        SettingError: the launcher has not started this process, or has started more processes than there are GPUs;
            or torchrun has started several processes and ``launcher`` is ``none``.
    """
    config.launcher = launcher
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a torchrun that is killed leaves its ranks running
        parent = int(os.environ.get("MMSNNET_LAUNCHER", os.getppid()))
        threading.Thread(target=_end_with_launcher, args=[parent], daemon=True).start()
    if launcher == "none":
        if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise SettingError(
                f"torchrun has started {os.environ['WORLD_SIZE']} processes: set --launcher pytorch, or each is a run "
                "by itself in the same work folder"
            )
        return
    if not is_distributed():
        process = Process.from_environment(launcher)
        dist_cfg = config.setdefault("env_cfg", {}).setdefault("dist_cfg", {})
        port = dist_cfg.pop("port", None)
        if launcher == "slurm":
            process.set_torch_variables(port)
            config.launcher = "pytorch"
        if torch.cuda.is_available():
            _check_gpus(process)
        if get_device() == "cpu":
            _start_gloo(process, dist_cfg)
    if get_device() == "cpu" and (wrapper := _data_parallel(config)) is not None:
        # Without this setting, mmengine passes the GPU of the rank even if there is none.
        wrapper["device_ids"] = None
        config.model_wrapper_cfg = wrapper


def _check_gpus(process: Process) -> None:
    gpus = torch.cuda.device_count()
    needed = process.local_world_size or process.local_rank + 1
    if needed > gpus:
        raise SettingError(
            f"this machine has at least {needed} processes, and each sees {gpus} GPU{'s' * (gpus != 1)}: start one for "
            "each GPU and make all GPUs visible to all processes (CUDA_VISIBLE_DEVICES; srun --gres=gpu:N instead of "
            "--gpus-per-task), or set CUDA_VISIBLE_DEVICES=-1 to run on CPUs"
        )


def _start_gloo(process: Process, dist_cfg: dict[str, Any]) -> None:
    """Start a gloo process group with the timeout of ``env_cfg.dist_cfg``."""
    dist_cfg["backend"] = "gloo"
    # By default gloo listens at the address of the host name, which may not resolve.
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if process.on_one_machine and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    timeout = dist_cfg.get("timeout")
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
            raise SettingError(f"env_cfg.dist_cfg.timeout is a positive number of seconds, got {timeout!r}")
        timeout = timedelta(seconds=timeout)
    distributed.init_process_group("gloo", timeout=timeout)


def check_data_parallel(config: Config, launcher: str, model: nn.Module) -> None:
    """Check that no ``DistributedDataParallel`` waits for the gradients of all parameters.

    A stitch uses only some of them, and torch raises its error in the second iteration.

    Args:
        model: of the config, with or without weights.

    Raises:
        SettingError: names the wrapper to set.
    """
    if launcher == "none" or (wrapper := _data_parallel(config)) is None or wrapper.get("find_unused_parameters"):
        return
    if any(isinstance(module, StitchedBackbone) and len(module.space) > 1 for module in model.modules()):
        raise SettingError(
            f"{wrapper['type']} waits for the gradients of all parameters, and a stitch uses only some: set "
            "model_wrapper_cfg=dict(type='mmsnnet.StitchedDataParallel') in the config, or find_unused_parameters=True "
            "of the wrapper, which is slower"
        )


def _data_parallel(config: Config) -> dict[str, Any] | None:
    """The settings of the ``DistributedDataParallel`` around the model, or None for another wrapper."""
    if config.get("runner_type", "Runner") != "Runner":
        return None
    wrapper = config.get("model_wrapper_cfg")
    if wrapper is None:  # mmengine's default
        wrapper = dict(broadcast_buffers=False, find_unused_parameters=config.get("find_unused_parameters", False))
    wrapper.setdefault("type", "MMDistributedDataParallel")
    class_ = MODEL_WRAPPERS.get(wrapper["type"]) if isinstance(wrapper["type"], str) else wrapper["type"]
    return wrapper if isinstance(class_, type) and issubclass(class_, DistributedDataParallel) else None


def check_sync_bn(config: Config, launcher: str) -> None:
    """Check that no synchronised batch norm is trained on CPUs: torch raises its error in the first iteration.

    Raises:
        SettingError: names the settings to change.
    """
    if launcher == "none" or get_device() != "cpu":
        return
    settings = [f"{setting}.type=BN" for setting in _sync_bns(config.get("model"), "model")]
    settings += ["sync_bn=None"] * (config.get("sync_bn") is not None)
    if settings:
        raise SettingError(
            "synchronised batch norms train on GPUs only: without a GPU use one process, or "
            f"--cfg-options {' '.join(settings)}"
        )


def _sync_bns(setting: Any, path: str) -> Iterator[str]:
    """The dotted keys of the synchronised batch norms below a setting."""
    if isinstance(setting, Mapping):
        if setting.get("type") in ("SyncBN", "MMSyncBN"):
            yield path
        for key, inner in setting.items():
            yield from _sync_bns(inner, f"{path}.{key}")
    elif isinstance(setting, list | tuple):
        for index, inner in enumerate(setting):
            yield from _sync_bns(inner, f"{path}.{index}")


@contextmanager
def process_group() -> Iterator[None]:
    """Destroy the process group at the end of the block.

    Raises:
        LostConnectionError: another process has ended during the block.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo/transport" in str(error)
        if not lost or "EADDRINUSE" in str(error):  # rank 0's port is taken: this process can say so itself
            raise
        raise LostConnectionError(
            "another process of this run has ended or cannot be reached; see its message for the cause (here: "
            f"{' '.join(str(error).split())})"
        ) from error
    if is_distributed():
        distributed.destroy_process_group()
