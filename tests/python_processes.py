"""Python processes that start with the imports done.

Importing torch, mmengine, mmseg and this package takes about 8 seconds of a core, more than most tests that need a
process of their own. A server imports them once for each pytest worker and forks for each call. A call has its own
process, environment, folder and output, as if it were started by a shell.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType

import torch

try:
    from yapf.yapflib import yapf_api
except ImportError:  # the tests of mmsnnet.stitching run without OpenMMLab
    pass
else:
    # mmengine formats each config that it logs or saves, which takes longer than a tiny run trains.
    yapf_api.FormatCode = lambda text, **_: (text, False)

REPOSITORY = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["mmsnnet.apis", "mmsnnet.datasets", "mmsnnet.engine", "mmseg.models", __name__])


class PythonProcess:
    """A running ``python ARGUMENTS``: a script or ``-c CODE``, and what follows.

    Args:
        arguments: of Python.
        folder: where the process runs.
        output: an empty folder, for what the process prints.
        quiet: ignore warnings, as ``python -W ignore``.
        variables: of the environment, beside those of this process.
    """

    def __init__(
        self, *arguments: object, folder: Path, output: Path, quiet: bool = False, **variables: object
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._stdout, self._stderr = output / "stdout.txt", output / "stderr.txt"
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        self.process: ForkServerProcess = _CONTEXT.Process(
            target=_run, args=(self.arguments, folder, dict(environment), self._stdout, self._stderr, quiet)
        )
        self.process.start()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text() if self._stderr.exists() else ""

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """The ended process.

        Raises:
            subprocess.TimeoutExpired: it ran for longer; it is killed.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout, stderr=self.stderr)
        stdout = self._stdout.read_text() if self._stdout.exists() else ""
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, stdout, self.stderr)


def _run(
    arguments: list[str], folder: Path, environment: dict[str, str], stdout: Path, stderr: Path, quiet: bool
) -> None:
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if quiet:
        warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    script, *rest = arguments
    if script == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
