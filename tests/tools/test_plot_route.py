import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Main = Callable[[list[str]], None]
REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
SEGMENTER = CONFIGS / "quickstart" / "stitched-vit-s-l_setr_shapes-64x64.py"
CLASSIFIER = CONFIGS / "imagenet" / "stitched-vit-s-l_4e_cifar10-32x32.py"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """The command in this process: a new process takes seconds to start."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools" / "analysis_tools"))
    import plot_route as command

    return command.main


@pytest.mark.slow
def test_writes_the_picture(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools/analysis_tools/plot_route.py", SEGMENTER, "L,S0-L2", "--out", "a/b.png"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{os.path.join('a', 'b.png')}\n"
    with Image.open(tmp_path / "a" / "b.png") as image:
        image.load()
        assert image.size[0] == 1200


@pytest.mark.slow
def test_the_routes_and_taps_are_those_of_the_config(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr("plot_route.plot_routes", lambda *arguments: seen.append(arguments) or arguments[2])
    settings = ["--cfg-options", "model.backbone.scheme=one_way"]
    main([str(SEGMENTER), "anchors", "--out", "a.png"])
    main([str(SEGMENTER), "all", "--out", "a.png", *settings])
    main([str(CLASSIFIER), "anchors", "--out", "a.png"])
    (two_way, _, _, taps), (one_way, stitches, out, _), (*_, none) = seen
    assert (two_way.scheme, one_way.scheme, stitches, out) == ("two_way", "one_way", "all", "a.png")
    # Taps that auxiliary heads alone read are not run in evaluation mode; a classifier has none.
    assert taps == (two_way.depths[1] - 1,) and none == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SEGMENTER, "555", "--out", "old.png"], "no stitch 555"),
        ([SEGMENTER, "X9", "--out", "old.png"], "no stitch 'X9'"),
        ([SEGMENTER, "S", "--out", "old.pdf"], "expected a name that ends in .png or .svg, found '.pdf'"),
        (["nowhere.py", "S", "--out", "old.png"], "there is no config 'nowhere.py'"),
        ([SEGMENTER, "S", "--out", "old.png/b.png"], "old.png"),
        ([SEGMENTER, "S"], "--out"),
    ],
)
def test_mistakes(
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.png").write_bytes(b"old")
    with pytest.raises(SystemExit) as leave:
        main(list(map(str, arguments)))
    assert leave.value.code == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert message in error
    assert os.listdir(tmp_path) == ["old.png"] and Path("old.png").read_bytes() == b"old"
