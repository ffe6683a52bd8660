"""Arguments that the tools share."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from mmengine.config import DictAction as MMEngineDictAction

from mmsnnet.cli.launching import VARIABLES, LostConnectionError

# torchrun's summary names the rank with the earliest time as the cause. A killed rank gets the time when torchrun
# notices its end. So a rank that has only lost its connection to another reports a time as much later.
LATER_S = 10


class DictAction(MMEngineDictAction):
    """mmengine's ``KEY=VALUE`` options; others end the command with one line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if not re.match("[^=]+=", value):
                raise argparse.ArgumentError(self, f"{value!r} is not KEY=VALUE")
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # mmengine's, for brackets that do not match
            raise argparse.ArgumentError(self, str(error)) from error


class DistributedParser(argparse.ArgumentParser):
    """The parser of a tool that several processes run.

    All ranks find a mistake in a command or a config. Rank 0 prints it. Under torchrun the other ranks print nothing:
    torchrun's summary shows the message of the first rank that failed. Slurm has no summary, so there each rank prints
    its message with its number.
    """

    def error(self, message: str) -> NoReturn:
        rank = next((os.environ[names[0]] for names in VARIABLES.values() if names[0] in os.environ), "0")
        if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            late_s = LATER_S if isinstance(sys.exc_info()[1], LostConnectionError) else 0
            details = {"py_callstack": message, "timestamp": str(int(time.time()) + late_s)}
            Path(summary).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
            if rank != "0":
                self.exit(2)
        super().error(message if rank == "0" else f"rank {rank}: {message}")


def add_config_arguments(parser: argparse.ArgumentParser, help: str = "config file") -> None:
    """Add the config and ``--cfg-options``."""
    parser.add_argument("config", type=os.path.expanduser, help=help)
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings of the config"
    )


class BackendAction(argparse.Action):
    """``--backend onnx DIR``: the folder of an export, as ``args.export``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values[0] != "onnx":
            raise argparse.ArgumentError(self, f"the backend is onnx, got {values[0]!r}")
        setattr(namespace, self.dest, Path(values[1]).expanduser())


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--backend``."""
    parser.add_argument(
        "--backend",
        nargs=2,
        action=BackendAction,
        dest="export",
        metavar=("onnx", "DIR"),
        help="run the stitches of an export in ONNX Runtime (default: PyTorch)",
    )


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--launcher``, and what torch.distributed.launch passes."""
    parser.add_argument("--launcher", choices=("none", *VARIABLES), default="none", help="job launcher")
    # torch.distributed.launch, which mim calls, passes the local rank here and in the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
