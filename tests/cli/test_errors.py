"""What is answered by one line, and what keeps its traceback."""

import argparse
import os
from collections.abc import Callable

import pytest
from mmengine.registry import MODELS
from mmengine.runner import BaseLoop
from torch.utils.data import DataLoader, Dataset

from mmsnnet.cli.errors import in_one_line, is_mistake, mistakes_answered
from mmsnnet.engine.hooks.atomic_checkpoint_hook import CheckpointFolderError, CheckpointWriteError
from mmsnnet.engine.hooks.consistency_hook import NotFiniteError, RanksDifferError
from mmsnnet.engine.runner import CannotResumeError
from mmsnnet.errors import DataError, MissingFileError, SettingError


class Loop(BaseLoop):
    """Runs what it is given."""

    def __init__(self, job: Callable[[], None]) -> None:
        self.job = job

    def run(self) -> None:
        self.job()


def caught(job: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as found:
        job()
    return found.value


def refuse(error: Exception) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("x"),
        FileNotFoundError("x"),
        RuntimeError("x"),
        OSError(30, "Read-only file system"),
        ConnectionResetError("x"),
        ImportError("x"),
        KeyError("x"),
        TypeError("x"),
        ValueError("x"),
    ],
)
def test_a_mistake_is_one_until_a_loop_runs(error: Exception) -> None:
    assert is_mistake(caught(refuse(error)))
    assert not is_mistake(caught(Loop(refuse(error)).run))


@pytest.mark.parametrize(
    "error",
    [
        CannotResumeError("x"),
        CheckpointFolderError(28, "x"),
        CheckpointWriteError(28, "x"),
        NotFiniteError("x"),
        RanksDifferError("x"),
        SettingError("x"),
        DataError("x"),
        MissingFileError("x"),
    ],
)
def test_our_verdicts_in_a_loop_are_answered_too(error: Exception) -> None:
    assert is_mistake(caught(refuse(error))) and is_mistake(caught(Loop(refuse(error)).run))


@pytest.mark.parametrize("error", [AttributeError("x"), FloatingPointError("x"), IndexError("x")])
def test_what_is_no_mistake(error: Exception) -> None:
    assert not is_mistake(caught(refuse(error)))


def test_what_python_says_comes_with_its_place() -> None:
    assert in_one_line(caught(lambda: {}["head"])).startswith("KeyError: 'head' (")
    said = in_one_line(caught(lambda: len(3)))
    assert said.startswith("TypeError: object of type 'int' has no len() (") and "test_mistakes.py, line " in said
    said = in_one_line(caught(lambda: os.read(-1, 1)))
    assert said.startswith("OSError: [Errno 9] Bad file descriptor (") and "test_mistakes.py, line " in said


def test_our_own_words_stand_alone_and_in_one_line() -> None:
    assert in_one_line(caught(refuse(ValueError("rank is\n  0 or more")))) == "rank is 0 or more"
    assert in_one_line(caught(refuse(OSError(30, "the work folder is\nx")))) == "[Errno 30] the work folder is x"
    # Python names the file.
    assert in_one_line(caught(lambda: os.listdir("/dev/null"))) == "[Errno 20] Not a directory: '/dev/null'"


def test_what_a_library_says_while_something_is_built_comes_with_its_name() -> None:
    """mmengine's assertions and NumPy's errors, which name no setting."""
    preprocessor = dict(type="ImgDataPreprocessor", mean=[1.0] * 4, std=[1.0] * 4)
    said = in_one_line(caught(lambda: MODELS.build(preprocessor)))
    assert "got 4 values" in said and said.endswith("building ImgDataPreprocessor)")


class Broken(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise DataError("a.png: DataError: a file\nof no image")


def test_what_a_worker_of_a_loader_raises_is_said_without_its_traceback() -> None:
    error = caught(lambda: next(iter(DataLoader(Broken(), num_workers=1))))
    assert is_mistake(error) and "Traceback" in str(error)
    assert in_one_line(error) == "a.png: DataError: a file of no image"


def test_a_tool_answers_mistakes_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = argparse.ArgumentParser(prog="tool")
    with pytest.raises(SystemExit, match="2"), mistakes_answered(command):
        raise ValueError("two\nlines")
    assert capsys.readouterr().err.splitlines()[-1] == "tool: error: two lines"
    with pytest.raises(ZeroDivisionError), mistakes_answered(command):
        raise ZeroDivisionError
