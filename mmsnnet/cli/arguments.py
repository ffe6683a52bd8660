"""Arguments that the tools share."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NoReturn

from mmengine.config import DictAction as MMEngineDictAction

from mmsnnet.cli.launching import HEAD_START, RANKS


class DictAction(MMEngineDictAction):
    """mmengine's ``KEY=VALUE`` options, with a command line's answer to what is none."""

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
        except AssertionError as error:  # of brackets that do not match
            raise argparse.ArgumentError(self, str(error)) from error


class LaunchedParser(argparse.ArgumentParser):
    """The parser of a tool that several processes may run: what is wrong with a command line or a config, all of them
    find out, and one of them says, in torchrun's summary, too."""

    def error(self, message: str) -> NoReturn:
        names = (names[0] for names in RANKS.values())
        rank = next((os.environ[name] for name in names if name in os.environ), "0")
        if rank != "0":
            time.sleep(HEAD_START)
            message = f"rank {rank}: {message}"  # which rank 0 has not found
        if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            place = {"py_callstack": message, "timestamp": str(int(time.time()))}
            Path(summary).write_text(json.dumps({"message": {"message": message, "extraInfo": place}}))
        super().error(message)
