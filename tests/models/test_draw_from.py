"""Training draws from a choice of stitches; ids and evaluation keep all of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import Tensor

from mmsnnet.apis.extract import extracted_config
from mmsnnet.apis.publish import published_config
from mmsnnet.engine.resuming.records import _describe_draws as describe_draws
from mmsnnet.errors import SettingError, UserError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.models import StitchedBackbone
from mmsnnet.models.backbones.draw_from import sampler_of
from mmsnnet.stitching import Cost

Make = Callable[..., StitchedBackbone]


def drawn(backbone: StitchedBackbone, images: Tensor, number: int = 60) -> set[str]:
    sampler = backbone.sampler()
    return {backbone.space[sampler.draw(n)].name for n in range(number)}


@pytest.mark.parametrize(
    ("chosen", "condition"),
    [
        (dict(kinds=["S", "L", "SL"]), lambda stitch: stitch.kind in ("S", "L", "SL")),
        (dict(max_crossings=1), lambda stitch: len(stitch.segments) <= 2),
        (dict(max_crossings=0), lambda stitch: stitch.name in ("S", "L")),
        (dict(kinds="SL"), lambda stitch: stitch.kind == "SL"),
        (dict(stitches=[0, "L"]), lambda stitch: stitch.name in ("S", "L")),
        (dict(kinds=["SL", "LS"], stitches=["S0-L2", "L"]), lambda stitch: stitch.name == "S0-L2"),
    ],
)
def test_only_chosen_stitches_are_drawn(
    chosen: dict[str, Any], condition: Callable[..., bool], make_backbone: Make, make_images: Callable[..., Tensor]
) -> None:
    whole, backbone = make_backbone(), make_backbone(draw_from=chosen)
    assert backbone.space.stitches == whole.space.stitches
    assert drawn(backbone, make_images(1)) == {stitch.name for stitch in whole.space if condition(stitch)}


def test_cheap_stitches_are_drawn_more_often(make_backbone: Make) -> None:
    """As often as makes each bin's training cost the same, the costliest one's aside; after narrowing, too."""
    backbone = make_backbone(draw_from=dict(equal_flops=True), flops_step=1.0)
    costs = {id_: cost.flops for id_, cost in backbone.training_costs().items()}
    for _ in range(2):
        sampler = backbone.sampler()
        trained = [weight * costs[id_] for (id_,), weight in zip(sampler.bins, sampler.weights, strict=True)]
        assert trained[:-1] == pytest.approx(trained[:1] * (len(trained) - 1), rel=1e-3)
        drawn_costs = [costs[id_] for (id_,) in sampler.bins]
        assert trained[-1] / sum(trained) == pytest.approx(drawn_costs[-1] / sum(drawn_costs), rel=1e-3)
        backbone.draw_only([0, 1, 2])


def test_anchors_get_as_much_as_a_bin(make_backbone: Make) -> None:
    """With equal FLOPs each is a bin of its own, however wide the bins are."""
    for chosen in ({}, dict(kinds=["L", "SL"])):
        backbone = make_backbone(draw_from=dict(equal_flops=True, **chosen), flops_step=1e12)
        anchors = {anchor.id for anchor in backbone.space.anchors if not chosen or anchor.name in chosen["kinds"]}
        sampler = backbone.sampler()
        assert {(id_,) for id_ in anchors} < set(sampler.bins) and len(sampler.bins) == len(anchors) + 1
        assert len(make_backbone(draw_from=chosen, flops_step=1e12).sampler().bins) == 1


def test_the_largest_anchor_keeps_its_part_below_costlier_routes(make_backbone: Make) -> None:
    space = make_backbone().space
    costs = {stitch.id: Cost(flops=100 + stitch.id, params=1) for stitch in space}  # crossing routes come after L
    sampler = sampler_of(space, dict(equal_flops=True), costs, 1.0, seed=0)
    flops = [sum(costs[id_].flops for id_ in bin_) / len(bin_) for bin_ in sampler.bins]
    parts = [weight * mean / 1000 for weight, mean in zip(sampler.weights, flops, strict=True)]
    index = sampler.bins.index((space["L"].id,))
    assert index < len(flops) - 1
    kept = parts.pop(index)
    assert parts == pytest.approx(parts[:1] * len(parts), rel=1e-3)
    assert kept / (kept + sum(parts)) == pytest.approx(flops[index] / sum(flops), rel=1e-3)


@pytest.mark.parametrize("equal", [False, True])
def test_a_record_has_the_bins_that_weights_draw(equal: bool, make_backbone: Make) -> None:
    """A resumed run says that they differ."""
    chosen = dict(equal_flops=equal)
    described = {describe_draws(make_backbone(draw_from=chosen, flops_step=step)) for step in (1.0, 1e12)}
    assert len(described) == 1 + equal and all(("with equal_flops" in text) == equal for text in described)


def test_steps_draw_from_the_choice_too(make_backbone: Make, make_images: Callable[..., Tensor]) -> None:
    backbone = make_backbone(draw_from=dict(kinds=["SL", "LS"]))
    backbone.stitches_per_step = 3
    with backbone.share_step():
        for _ in range(3):
            backbone(make_images(1))
            assert backbone.drawn.kind in ("SL", "LS")


def test_the_front_of_a_file_and_the_anchors(make_backbone: Make, tmp_path: Path) -> None:
    backbone = make_backbone()
    flops = {id_: cost.flops for id_, cost in backbone.costs().items()}
    points = OperatingPoints(
        config="a.py", checkpoint=None, dataset=None, input_shape=(32, 32), device=None, depths=(2, 4)
    )
    best = max(flops, key=flops.__getitem__)
    good = backbone.space["S0-L2"].id
    for stitch in backbone.space:
        quality = {good: 50.0, best: 10.0}.get(stitch.id, 5.0)
        points = points.add(
            OperatingPoint(stitch.id, stitch.name, stitch.kind, flops[stitch.id], 1, metrics=dict(mIoU=quality))
        )
    points.save(tmp_path / "points.json")
    narrow = make_backbone(draw_from=dict(front_of=str(tmp_path / "points.json")))
    sampler = narrow.sampler()
    assert {narrow.space[sampler.draw(n)].name for n in range(40)} == {"S", "S0-L2", "L"}


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (dict(kinds=["XL"]), "draw_from.kinds has no 'XL'; the space has S, L, SL, LS"),
        (dict(kinds=["SL"], max_crossings=0), "leaves no stitch"),
        (dict(stitches=["S9-L9"]), "draw_from.stitches: no stitch 'S9-L9'"),
    ],
)
def test_a_choice_that_cannot_be(chosen: dict[str, Any], text: str, make_backbone: Make) -> None:
    with pytest.raises(UserError, match=text):
        make_backbone(draw_from=chosen).sampler()


LIST_OF_STITCHES = ".stitches must be a list of ids or names of stitches, got "
NO_DICT = " must be a dict such as dict(max_crossings=1), got "


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        *((value, f"{NO_DICT}{value!r}") for value in ("S", ["S", "L"], 1, True, False, [])),
        (dict(kind=["SL"]), " has an unknown key 'kind'; it takes kinds, stitches"),
        *(
            (dict(kinds=value), f".kinds must be a kind of stitches or a list of them, got {value!r}")
            for value in (3, True, ["S", 3], dict(S=1))
        ),
        *(
            (dict(stitches=value), f"{LIST_OF_STITCHES}{value!r}")
            for value in (3, 0.5, True, [True], ["S", 0.5], [[0]], dict(S=1))
        ),
        *(
            (dict(max_crossings=value), f".max_crossings must be a whole number of at least 0, got {value!r}")
            for value in (-1, 1.0, True, "1", [1])
        ),
        *(
            (dict(front_of=value), f".front_of must be the path of a file of operating points, got {value!r}")
            for value in (3, True, "", ["points.json"])
        ),
        (dict(front_of="points.json", metric=3), ".metric must be the name of a metric, got 3"),
        (dict(metric="mIoU"), ".metric, 'mIoU', compares the points of front_of, which is not set"),
        *(
            (dict(equal_flops=value), f".equal_flops must be True or False, got {value!r}")
            for value in ("no", 0.5, 1, None)
        ),
    ],
)
def test_a_choice_of_wrong_type_is_refused_at_construction(chosen: Any, text: str, make_backbone: Make) -> None:
    text = f"StitchedViT's draw_from{text}"
    with pytest.raises(SettingError, match=f"^{re.escape(text)}"):
        make_backbone(draw_from=chosen)


def test_the_front_of_a_folder(make_backbone: Make, tmp_path: Path) -> None:
    backbone = make_backbone(draw_from=dict(front_of=tmp_path))
    with pytest.raises(SettingError, match=rf"draw_from\.front_of must be a file .*; '{tmp_path}' is a folder"):
        backbone.sampler()


def test_a_model_can_be_built_without_the_file_of_its_choice(make_backbone: Make) -> None:
    backbone = make_backbone(draw_from=dict(front_of="missing.json"))
    with pytest.raises(FileNotFoundError, match=r"^StitchedViT's draw_from\.front_of: .*missing\.json"):
        backbone.sampler()


def test_the_front_of_a_metric_that_the_points_lack(make_backbone: Make, tmp_path: Path) -> None:
    backbone = make_backbone()
    flops = {id_: cost.flops for id_, cost in backbone.costs().items()}
    points = OperatingPoints(
        config="a.py", checkpoint=None, dataset=None, input_shape=(32, 32), device=None, depths=(2, 4)
    )
    for s in backbone.space:
        points = points.add(OperatingPoint(s.id, s.name, s.kind, flops[s.id], 1, metrics=dict(mIoU=1.0)))
    points.save(tmp_path / "points.json")
    wrong = make_backbone(draw_from=dict(front_of=tmp_path / "points.json", metric="mIuO"))
    with pytest.raises(SettingError, match=r"^StitchedViT's draw_from\.metric, for '.*points\.json': .*mIuO"):
        wrong.sampler()


def test_the_front_of_no_points(make_backbone: Make, tmp_path: Path) -> None:
    (tmp_path / "points.json").write_text("{}")
    backbone = make_backbone(draw_from=dict(front_of=tmp_path / "points.json"))
    with pytest.raises(SettingError, match=r"^StitchedViT's draw_from\.front_of: .*points\.json"):
        backbone.sampler()


def test_one_stitch_of_a_choice_can_be_extracted() -> None:
    config = Config(dict(model=dict(type="mmsnnet.StitchedClassifier", backbone=dict(draw_from=dict(max_crossings=1)))))
    backbone = StitchedBackbone(
        [dict(model="vit_tiny_patch16_224", num_heads=2, embed_dim=32, depth=depth) for depth in (2, 4)],
        img_size=32,
        num_classes=4,
        draw_from=dict(max_crossings=1),
    )
    for extracted in (extracted_config(config, backbone, backbone.space["S"]), published_config(config)):
        assert "draw_from" not in extracted.model.backbone


def test_evaluation_runs_what_was_not_drawn(make_backbone: Make, make_images: Callable[..., Tensor]) -> None:
    backbone = make_backbone(draw_from=dict(max_crossings=0)).eval()
    backbone.set_stitch("S0-L2")
    with torch.no_grad():
        assert backbone(make_images(1))[-1].isfinite().all()
