"""``python -m mmsnnet.demo``: mistakes end in one line before the server starts."""

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmsnnet.demo import __main__ as command
from tests.conftest import RunsCode
from tests.demo.published_model import publish


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish(folder)
    return folder / "model"


@pytest.fixture
def model(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "model")


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which rejects its arguments; gives what it says."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
        monkeypatch.setattr(command, "serve", lambda *_: pytest.fail("the server has started"))
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 2
        *usage, last = capsys.readouterr().err.splitlines()
        assert usage[0].startswith("usage:") and "Traceback" not in str(usage)
        return last.removeprefix("python -m mmsnnet.demo: error: ")

    return run


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.py", "model.safetensors", "front.json"])
@pytest.mark.parametrize(
    "harm", [Path.unlink, cut, lambda path: path.write_bytes(b"")], ids=["missing", "cut", "empty"]
)
def test_a_damaged_folder_is_an_error(
    error: Callable[..., str], model: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(model / name)
    said = error(model)
    assert str(model) in said or "operating points" in said, said


def test_no_pickle_runs(error: Callable[..., str], model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(RunsCode(tmp_path / "mark")))
    assert "model.safetensors" in error(model)
    assert not (tmp_path / "mark").exists()


def test_other_mistakes(error: Callable[..., str], model: Path, tmp_path: Path) -> None:
    assert "no folder" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.py" in error(tmp_path / "empty")
    assert "has no pictures" in error(model, "--examples", tmp_path / "empty")
    assert "no metric 'PSNR'" in error(model, "--metric", "PSNR")
    assert "--max-upload-mb is a positive number" in error(model, "--max-upload-mb", "0")
    assert "nonsense" in error(model, "--device", "nonsense")
    assert "no such file" in error(model, "--points", tmp_path / "points.json")


def test_without_gradio_the_extra_is_named(
    error: Callable[..., str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "gradio"] + ["gradio"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert error(model) == "gradio is missing: pip install 'mmsnnet[demo]'"
