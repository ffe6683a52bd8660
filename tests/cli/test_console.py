import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mmengine.logging import MMLogger
from mmengine.runner import FlexibleRunner, Runner

from mmsnnet.apis import load_config
from mmsnnet.cli.console import LOG_FILE_ONLY, is_for_console, short_console
from mmsnnet.cli.runner import build_runner

CONFIG = Path(__file__).parents[2] / "configs/quickstart/vit-s_setr_shapes-64x64.py"
NOTICE = "Default ``avg_non_ignore`` is False, if you would like to ignore the certain label and average loss"
MATTERS = "train_dataloader.batch_size is 1: batch norms need more"


@pytest.fixture(autouse=True)
def new_loggers() -> Iterator[None]:
    """Loggers of a test write to its streams and end with it."""
    before = MMLogger._instance_dict.copy()
    MMLogger._instance_dict.clear()
    yield
    MMLogger._instance_dict.clear()
    MMLogger._instance_dict.update(before)


def build(tmp_path: Path, runner_type: str = "Runner", **kwargs: Any) -> Runner | FlexibleRunner:
    config = load_config(CONFIG, {"experiment_name": tmp_path.name})
    if runner_type != "Runner":
        config.runner_type = runner_type
    return build_runner(config, work_dir=str(tmp_path), **kwargs)


def log(runner: Runner | FlexibleRunner) -> str:
    return Path(runner.logger.log_file).read_text()


@pytest.mark.parametrize("runner_type", ["Runner", "FlexibleRunner"])
def test_environment_and_config_are_only_in_the_log_file(
    runner_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = build(tmp_path, runner_type)
    shown = capsys.readouterr().out
    for text in ("System environment:", "Config:", "data_preprocessor", "Hooks will be executed"):
        assert text in log(runner) and text not in shown
    assert runner.logger.log_file in shown and len(shown.splitlines()) < 10
    assert isinstance(runner, FlexibleRunner if runner_type == "FlexibleRunner" else Runner)


def test_other_messages_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = build(tmp_path)
    for level, message in ((logging.INFO, "Iter(train) [50/800]"), (logging.WARNING, MATTERS)):
        runner.logger.log(level, message)
        assert message in capsys.readouterr().out and message in log(runner)


@pytest.mark.slow
def test_quiet_runners_show_only_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = build(tmp_path, quiet=True)
    runner.logger.info("Iter(train) [50/800]")
    assert capsys.readouterr().out == "" and "Iter(train) [50/800]" in log(runner)
    runner.logger.warning(MATTERS)
    assert MATTERS in capsys.readouterr().out
    assert [hook for hook in runner.hooks if type(hook).__name__ == "ProgressHook"]


@pytest.mark.slow
def test_warnings_reach_the_log_file_and_those_that_matter_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before there is a runner."""
    warned: list[str] = []  # Python would print them; pytest keeps them off the console
    monkeypatch.setattr(warnings, "showwarning", lambda message, *args: warned.append(str(message)))
    with short_console():
        warnings.simplefilter("always")
        warnings.warn(f"{NOTICE} 1", stacklevel=1)
        warnings.warn(f"{MATTERS} 1", stacklevel=1)
        MMLogger.get_current_instance().warning(f"shapes is not a meta file, simply parsed as meta information {1}")
        runner = build(tmp_path)
        warnings.warn(f"{NOTICE} 2", stacklevel=1)
        warnings.warn(f"{MATTERS} 2", stacklevel=1)
    shown = capsys.readouterr().out
    assert NOTICE not in shown and "not a meta file" not in shown
    assert [message for message in warned if message.startswith((NOTICE, MATTERS))] == [f"{MATTERS} 1", f"{MATTERS} 2"]
    for number in (1, 2):
        assert log(runner).count(f"{MATTERS} {number}") == 1 and log(runner).count(f"{NOTICE} {number}") == 1
    assert log(runner).count("not a meta file") == 1


def test_after_it_pythons_warnings_are_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    with short_console():
        assert warnings.showwarning is not before
    assert warnings.showwarning is before
    logger = MMLogger.get_instance("mmengine")
    assert not any(is_for_console in handler.filters for handler in logger.handlers)
    logger.warning(NOTICE)
    assert NOTICE in capsys.readouterr().out


@pytest.mark.parametrize(
    "message",
    [
        "Checkpoints will be saved to /tmp/run.",
        "The config asks for what is not there: Config: x",
        "Load checkpoint from x.pth",
        "mIoU is NaN for all classes",
        "Configuration of the data is odd",
    ],
)
def test_similar_messages_are_shown(message: str) -> None:
    assert LOG_FILE_ONLY.match(message) is None


def test_errors_are_always_shown() -> None:
    record = logging.LogRecord("mmengine", logging.ERROR, "", 0, NOTICE, None, None)
    assert is_for_console(record)
    record.levelno = logging.WARNING
    assert not is_for_console(record)


def test_a_log_file_that_cannot_be_written_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In place of a traceback for each record. Other errors of a record are reported as before."""
    runner = build(tmp_path)
    handler = next(handler for handler in runner.logger.handlers if isinstance(handler, logging.FileHandler))
    handler.stream.close()
    handler.stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device"):
        runner.logger.info("a line")
    handler.handle(logging.LogRecord("", logging.INFO, "", 0, b"\xff".decode(errors="surrogateescape"), None, None))
    assert capsys.readouterr().err.count("--- Logging error ---") == 1
