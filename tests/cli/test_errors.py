"""Which errors end a tool with one line, and which keep their traceback."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmsnnet.cli.errors import LIBRARY_ERRORS, describe, exit_on_user_error, user_errors
from mmsnnet.engine.hooks.consistency_hook import NotFiniteError, RanksDifferError
from mmsnnet.engine.runner.measured_points import CannotResumeError
from mmsnnet.errors import DataError, MissingFileError, MissingPackageError, SettingError, UserError, needs_extra
from mmsnnet.files.writing import OutputError

OURS = [
    CannotResumeError("x"),
    OutputError(28, "x"),
    NotFiniteError("x"),
    RanksDifferError("x"),
    SettingError("x"),
    DataError("x"),
    MissingFileError("x"),
    MissingPackageError("x"),
]


def caught(job: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as raised:
        job()
    return raised.value


@pytest.mark.parametrize("error", [*(class_("x") for class_ in LIBRARY_ERRORS), ConnectionResetError("x")])
def test_an_error_of_a_library_is_a_users_until_the_loop_starts(error: Exception) -> None:
    with pytest.raises(UserError) as raised, user_errors():
        raise error
    assert raised.value.__cause__ is error and "x" in str(raised.value)
    with pytest.raises(type(error)) as raised, user_errors() as loop_start:
        loop_start.before_train(None)
        raise error
    assert raised.value is error


@pytest.mark.parametrize("error", OURS)
def test_our_errors_pass_before_and_in_the_loop(error: Exception) -> None:
    for started in (False, True):
        with pytest.raises(type(error)) as raised, user_errors() as loop_start:
            loop_start.started = started
            raise error
        assert raised.value is error and isinstance(error, UserError)


@pytest.mark.parametrize("error", [AttributeError("x"), FloatingPointError("x"), IndexError("x")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), user_errors():
        raise error


class Model(nn.Module):
    """Fails in its first iteration."""

    def train_step(self, data: object, optim_wrapper: object) -> None:
        raise RuntimeError("in the loop")


def test_the_building_ends_when_the_loop_starts(tmp_path: Path) -> None:
    def train(**optimizer: object) -> None:
        runner = Runner(
            Model(),
            str(tmp_path),
            train_dataloader=dict(
                dataset=[0], batch_size=1, sampler=dict(type="DefaultSampler"), collate_fn=dict(type="default_collate")
            ),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", **optimizer)),
            experiment_name=f"{tmp_path.name}-{len(optimizer)}",
        )
        runner.model.weight = nn.Parameter(torch.zeros(1))
        with user_errors() as loop_start:
            runner.register_hook(loop_start)
            runner.train()

    # mmengine builds the optimizer in train().
    with pytest.raises(UserError, match=r"^TypeError: .* argument 'rate' \(.*\.py, line \d+\)$"):
        train(lr=0.1, rate=0.1)
    with pytest.raises(RuntimeError, match=r"^in the loop$"):
        train(lr=0.1)


def test_messages_of_python_have_type_and_place() -> None:
    assert describe(caught(lambda: {}["head"])).startswith("KeyError: 'head' (")
    text = describe(caught(lambda: len(3)))
    assert text.startswith("TypeError: object of type 'int' has no len() (") and "test_errors.py, line " in text
    text = describe(caught(lambda: os.read(-1, 1)))
    assert text.startswith("OSError: [Errno 9] Bad file descriptor (") and "test_errors.py, line " in text


def test_messages_of_libraries_have_type_and_place() -> None:
    """mmengine's assertions name no setting."""
    preprocessor = dict(type="ImgDataPreprocessor", mean=[1.0] * 4, std=[1.0] * 4)
    text = describe(caught(lambda: MODELS.build(preprocessor)))
    assert text.startswith("AssertionError: ") and "got 4 values" in text and "data_preprocessor.py, line " in text


def test_our_messages_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmsnnet.cli.errors.PACKAGE", Path(__file__).parent)

    def refuse() -> None:
        raise ValueError("rank is\n  0 or more")

    assert describe(caught(refuse)) == "rank is 0 or more"


class Broken(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise DataError("a.png: DataError: a file\nof no image")


def test_a_tool_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="tool")
    with pytest.raises(SystemExit, match="2"), exit_on_user_error(parser):
        raise SettingError("two\nlines")
    assert capsys.readouterr().err.splitlines()[-1] == "tool: error: two lines"
    with pytest.raises(ZeroDivisionError), exit_on_user_error(parser):
        raise ZeroDivisionError


def test_an_error_of_a_loaders_worker_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_on_user_error(argparse.ArgumentParser(prog="tool")):
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert capsys.readouterr().err.splitlines()[-1] == "tool: error: a.png: DataError: a file of no image"


@pytest.mark.parametrize("error", [SettingError("wrong"), ZeroDivisionError("wrong")])
def test_the_log_file_has_the_traceback(error: Exception, tmp_path: Path) -> None:
    logger = MMLogger.get_instance(f"{tmp_path.name}", log_file=str(tmp_path / "log.txt"))
    assert MMLogger.get_current_instance() is logger
    with pytest.raises((SystemExit, ZeroDivisionError)), exit_on_user_error(argparse.ArgumentParser()):
        raise error
    text = (tmp_path / "log.txt").read_text()
    assert "Traceback" in text and f"{type(error).__name__}: wrong" in text


def test_a_missing_package_is_named_with_its_extra() -> None:
    with (
        pytest.raises(MissingPackageError, match=r"^nowhere is missing: pip install 'mmsnnet\[viz\]'$"),
        needs_extra("viz"),
    ):
        import nowhere.inside  # noqa: F401
