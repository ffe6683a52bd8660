"""A checkpoint that version 0.1.0 wrote, before features had layouts, evaluates to the figures of that time.

It is of a segmentor with windows of two sizes, a relative position bias, class tokens and slide inference, trained on
the four images beside it until its stitches differ.
"""

from pathlib import Path

import pytest

from mmsnnet.evaluation import OperatingPoints
from tests.conftest import Tool

FOLDER = Path(__file__).parent / "checkpoint_of_0_1_0"


def test_an_old_checkpoint_gives_the_figures_that_it_gave(tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    tool("test", "config.py", "iter_1500.pth", "--out", out, "--work-dir", tmp_path / "work", cwd=FOLDER)
    before, after = OperatingPoints.load(FOLDER / "operating_points.json"), OperatingPoints.load(out)
    assert len({point.metrics["mIoU"] for point in before}) == len(before.points)  # or the test would see little
    for old, new in zip(before, after, strict=True):
        assert (new.id, new.name, new.kind, new.flops, new.params) == (
            old.id,
            old.name,
            old.kind,
            old.flops,
            old.params,
        )
        assert new.metrics == pytest.approx(old.metrics, abs=0.02)
    assert after.fingerprint["checkpoint"] == before.fingerprint["checkpoint"]
