"""``StitchedBackbone(budget=...)``: the stitch of evaluation mode from measured points."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import Tensor

from mmsnnet.apis import build_model, build_space, load_config
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints, compact_front
from mmsnnet.models import StitchedBackbone
from mmsnnet.registry import MODELS
from mmsnnet.stitching import StitchSpace

Config_ = Callable[..., dict[str, Any]]
MakeBackbone = Callable[..., StitchedBackbone]
MakeImages = Callable[..., Tensor]

REPOSITORY = Path(__file__).parents[2]
STITCHED = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"
DEEPER = dict(small=dict(depth=3), large=dict(depth=6), out_indices=(1, 5))
SPACE = StitchSpace.two_way((3, 6))


def measured(space: StitchSpace = SPACE) -> OperatingPoints:
    """The n-th stitch costs n + 1 GFLOPs and as many ms as are left; the better the dearer, by mIoU, and the worse by
    mAcc, the last one apart."""
    n = len(space)
    points = [
        OperatingPoint(s.id, s.name, s.kind, (i + 1) * 10**9, 1, {"mIoU": 40 + i % (n - 1), "mAcc": 60 - i}, n - i)
        for i, s in enumerate(space)
    ]
    return OperatingPoints("c.py", None, "shapes", (32, 32), "cpu", tuple(points))


@pytest.fixture
def front(tmp_path: Path) -> Path:
    path = tmp_path / "front.json"
    compact_front(measured(), "mIoU").save(path)
    return path


def test_forward_runs_the_stitch_within_the_budget(
    make_backbone: MakeBackbone, make_images: MakeImages, front: Path
) -> None:
    budgeted = make_backbone(**DEEPER, budget=dict(points=str(front), max_gflops=4.5)).eval()
    plain = make_backbone(**DEEPER).eval()
    plain.load_state_dict(budgeted.state_dict())
    expected = SPACE.stitches[3]
    assert budgeted.stitch == expected and plain.stitch != expected
    plain.set_stitch(expected.id)
    images = make_images()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(budgeted(images), plain(images), strict=True))


def test_another_budget_at_run_time(make_backbone: MakeBackbone, front: Path) -> None:
    backbone = make_backbone(**DEEPER, budget=dict(points=front, max_gflops=4.5))
    chosen = backbone.set_budget(max_gflops=7)
    assert (chosen.id, chosen.flops) == (backbone.stitch.id, 7 * 10**9)
    # The n-th has n + 1 ms less than all: the best within half of them is the last but one.
    assert backbone.set_budget(max_latency_ms=len(SPACE) / 2).id == backbone.stitch.id == SPACE.stitches[-2].id
    # The file is not read again.
    front.unlink()
    assert backbone.set_budget(max_gflops=2).id == backbone.stitch.id == SPACE.stitches[1].id
    backbone.set_stitch("L")
    assert backbone.stitch.name == "L"


def test_points_and_a_metric_at_run_time(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone(**DEEPER)
    with pytest.raises(ValueError, match=r"a budget needs points.*tools/test\.py"):
        backbone.set_budget(max_gflops=5)
    assert backbone.set_budget(measured(), max_gflops=5).id == SPACE.stitches[4].id
    assert backbone.set_budget(metric="mAcc", max_gflops=5).id == SPACE.stitches[0].id
    # The metric stays with the points, and goes with them.
    assert backbone.set_budget(max_gflops=6).id == SPACE.stitches[0].id
    assert backbone.set_budget(measured(), max_gflops=6).id == SPACE.stitches[5].id


def test_points_written_into_the_config(make_backbone: MakeBackbone, backbone_config: Config_) -> None:
    """As mmengine gives them to the backbone, on the meta device too."""
    entries = [point.to_json() for point in compact_front(measured(), "mIoU")]
    config = Config(dict(model=backbone_config(**DEEPER, budget=dict(points=entries, max_gflops=3))))
    written = Config.fromstring(config.pretty_text, ".py")
    with torch.device("meta"):
        assert MODELS.build(written.model).stitch == SPACE.stitches[2]


@pytest.mark.slow
def test_training_is_as_without(make_backbone: MakeBackbone, make_images: MakeImages, front: Path) -> None:
    budgeted = make_backbone(**DEEPER, budget=dict(points=front, max_gflops=4.5))
    plain = make_backbone(**DEEPER)
    assert budgeted.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(budgeted.state_dict())
    images, drawn = make_images(), set()
    for _ in range(12):
        assert all(torch.equal(a, b) for a, b in zip(budgeted(images), plain(images), strict=True))
        assert budgeted.drawn == plain.drawn
        drawn.add(plain.drawn)
    assert len(drawn) > 3


def test_a_copy_has_the_points(make_backbone: MakeBackbone, front: Path) -> None:
    backbone = make_backbone(**DEEPER, budget=dict(points=front, max_gflops=4.5))
    twin = copy.deepcopy(backbone)
    twin.set_budget(max_gflops=1)
    assert (twin.stitch, backbone.stitch) == (SPACE.stitches[0], SPACE.stitches[3])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(budget=dict(points=measured(), max_gflops=9), stitch="S"), ValueError, "stitch='S' and budget"),
        (dict(budget=dict(points=measured())), ValueError, "one of the two; got neither"),
        (dict(budget=dict(points=measured(), max_gflops=1, max_latency_ms=2)), ValueError, "one of the two; got max_"),
        (dict(budget=dict(max_gflops=9)), ValueError, "a budget needs points"),
        (
            dict(budget=dict(points=measured(), max_gflops=0.5)),
            ValueError,
            r"cheapest stitch, 0 \(S\), which needs 1.0",
        ),
        (dict(budget=dict(points=measured(), max_gflops=9, metric="mAP")), ValueError, "has no metric 'mAP'"),
        (dict(budget=dict(points="nowhere.json", max_gflops=9)), FileNotFoundError, r"nowhere\.json: no such file"),
        (dict(budget=dict(points=measured(), gflops=9)), TypeError, "gflops"),
    ],
)
def test_mistakes(settings: dict[str, Any], error: type[Exception], message: str, make_backbone: MakeBackbone) -> None:
    with pytest.raises(error, match=message):
        make_backbone(**DEEPER, **settings)


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ((2, 4), r"stitch 4 \(L1-S1\) is not in this one, of 8 stitches"),
        ((4, 8), r"stitch 4 \(S2-L6\) is not in this one, of 8 stitches"),
        ((3, 7), "id 2 is S0-L3 there, and S0-L2 here"),
    ],
)
def test_points_of_another_space_are_refused(
    depths: tuple[int, int], message: str, make_backbone: MakeBackbone, front: Path
) -> None:
    backbone = make_backbone(**DEEPER, budget=dict(points=front, max_gflops=4.5))
    with pytest.raises(ValueError, match=f"of another stitch space: {message}"):
        backbone.set_budget(measured(StitchSpace.two_way(depths)), max_gflops=1e9)
    # The route and the points are still those of before.
    assert backbone.stitch == SPACE.stitches[3]
    assert backbone.set_budget(max_gflops=1).id == SPACE.stitches[0].id


def test_points_of_recalibrated_batch_norms_are_refused(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """All stitches of a model share one set of statistics."""
    recalibrated = replace(measured(), recalibrated=64)
    compact_front(recalibrated, "mIoU").save(tmp_path / "front.json")
    backbone = make_backbone(**DEEPER)
    for points in (recalibrated, tmp_path / "front.json"):
        with pytest.raises(SettingError, match=r"recalibrated for each stitch.*extract_stitch\.py --recalibrate 64"):
            backbone.set_budget(points, max_gflops=5)
    assert backbone.stitch.name == "L"


@pytest.mark.slow
def test_a_config_with_a_budget(tmp_path: Path) -> None:
    space = build_space(load_config(STITCHED))
    compact_front(measured(space), "mIoU").save(tmp_path / "front.json")
    path = tmp_path / "config.py"
    budget = f"dict(points={str(tmp_path / 'front.json')!r}, max_gflops=6.0)"
    path.write_text(f"_base_ = {str(STITCHED)!r}\nmodel = dict(backbone=dict(budget={budget}))\n")
    assert build_space(load_config(path)) == space
    model = build_model(load_config(path))
    assert model.backbone.stitch == space.stitches[5]
    options = {"model.backbone.budget.max_gflops": 2}
    assert build_model(load_config(path, options)).backbone.stitch == space.stitches[1]
    (tmp_path / "front.json").write_text("{")
    with pytest.raises(ValueError, match=r"front\.json: expected operating points in JSON"):
        build_space(load_config(path))
