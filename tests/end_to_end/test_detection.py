"""The real detection configs, made small by a config that bases on them, on COCO's layout by the ordinary tools."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmsnnet.apis import build_model, load_config
from mmsnnet.datasets import write_shapes
from mmsnnet.evaluation import OperatingPoints
from tests.conftest import Tool

pytestmark = pytest.mark.detection

REPOSITORY = Path(__file__).parents[2]
CONFIG = str(REPOSITORY / "configs/coco/stitched-deit3-s-l_{}_8xb8-100e_coco-1024x1024.py")
EPOCHS, MORE_EPOCHS = 4, 5
TRAIN_IMAGES, BATCH_SIZE = 8, 2

# Anchors of depths 2 and 4, in windows of 2 x 2 patches, on images of 96 x 96.
SMALLER = """
_base_ = {base!r}
size = (96, 96)
tiny = dict(model="deit3_small_patch16_224", num_heads=2, window_size=2, init_values=1.0)
model = dict(
    data_preprocessor=dict(pad_size_divisor=96),
    backbone=dict(
        anchors=[
            dict(tiny, embed_dim=32, depth=2, global_blocks=(1,)),
            dict(tiny, embed_dim=48, depth=4, global_blocks=(1, 3)),
        ],
        img_size=96,
        rank=2,
        flops_step=1e6,
    ),
    neck=dict(in_channels=48, out_channels=32),
    {heads}
)
train_dataloader = dict(batch_size={batch}, num_workers=0, persistent_workers=False, dataset=dict(data_root={data!r}))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [dict(type="ConstantLR", factor=1.0)]
train_cfg = dict(max_epochs={epochs}, val_interval={epochs})
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=-1))
log_processor = dict(window_size=1)
"""
TWO_STAGE = """
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, conv_out_channels=32, fc_out_channels=64),
        {masks}
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50), rcnn=dict(score_thr=0.0, max_per_img=10)),
"""
MASKS = "mask_roi_extractor=dict(out_channels=32), mask_head=dict(in_channels=32, conv_out_channels=32),"
HEADS = {
    "mask-rcnn": TWO_STAGE.format(masks=MASKS),
    "faster-rcnn": TWO_STAGE.format(masks=""),
    "rtmdet": 'bbox_head=dict(in_channels=32, feat_channels=32, norm_cfg=dict(type="BN")),',
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detection")


@pytest.fixture(scope="module")
def shapes(work: Path) -> Path:
    """A few images in COCO's layout."""
    return write_shapes(work / "data", "coco", TRAIN_IMAGES, 3, (64, 96))


@pytest.fixture(scope="module")
def smaller(shapes: Path, work: Path) -> Callable[..., Path]:
    """``smaller(head, epochs)``: a real config cut down. The images of its pipelines follow its ``img_size``."""

    def write(head: str, epochs: int = EPOCHS) -> Path:
        base = CONFIG.format(head)
        text = SMALLER.format(base=base, heads=HEADS[head], data=str(shapes), epochs=epochs, batch=BATCH_SIZE)
        config = Config.fromfile(base)
        for name in ("train", "val", "test"):
            steps = [_resized(step.to_dict()) for step in config[f"{name}_dataloader"].dataset.pipeline]
            text += f"{name}_dataloader['dataset']['pipeline'] = {steps}\n"
        path = work / f"{head}_{epochs}e.py"
        path.write_text(text)
        return path

    return write


def _resized(transform: dict[str, Any]) -> dict[str, Any]:
    """A step of a pipeline for images of 96 x 96 instead of 1024 x 1024."""
    return {key: (96, 96) if value == (1024, 1024) else value for key, value in transform.items()}


@pytest.fixture(scope="module")
def trained(tool: Tool, smaller: Callable[..., Path], work: Path) -> Path:
    """The work folder of a trained Mask R-CNN."""
    tool("train", smaller("mask-rcnn"), "--work-dir", work / "trained")
    return work / "trained"


@pytest.fixture(scope="module")
def resumed(tool: Tool, smaller: Callable[..., Path], trained: Path) -> Path:
    """A copy of the work folder in which training went on."""
    copy = shutil.copytree(trained, trained.with_name("resumed"))
    tool("train", smaller("mask-rcnn", MORE_EPOCHS), "--work-dir", copy, "--resume")
    return copy


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    """What the last run in a work folder logged."""
    return [json.loads(line) for line in max(work_dir.glob("*/vis_data/scalars.json")).read_text().splitlines()]


def losses(work_dir: Path) -> dict[int, list[float]]:
    """The losses of the iterations of each epoch that the last run trained."""
    found: dict[int, list[float]] = {}
    for entry in scalars(work_dir):
        if "loss" in entry:
            found.setdefault(entry["epoch"], []).append(entry["loss"])
    return found


def draws(work_dir: Path, epoch: int) -> int:
    checkpoint = torch.load(work_dir / f"epoch_{epoch}.pth", map_location="cpu", weights_only=False)
    return int(checkpoint["state_dict"]["backbone.draws"])


def test_the_loss_falls(trained: Path) -> None:
    found = losses(trained)
    iterations = TRAIN_IMAGES // BATCH_SIZE
    assert {epoch: len(values) for epoch, values in found.items()} == dict.fromkeys(range(1, EPOCHS + 1), iterations)
    assert sum(found[EPOCHS]) < 0.8 * sum(found[1])
    assert draws(trained, EPOCHS) == EPOCHS * iterations


def test_the_anchors_are_validated_and_the_best_is_kept(trained: Path) -> None:
    (validation,) = (entry for entry in scalars(trained) if "L/coco/bbox_mAP" in entry)
    assert {"S/coco/bbox_mAP", "S/coco/segm_mAP", "L/coco/segm_mAP"} <= validation.keys()
    assert [path.name for path in trained.glob("best_*")] == [f"best_L_coco_bbox_mAP_epoch_{EPOCHS}.pth"]


def test_training_is_resumed_where_it_stopped(resumed: Path) -> None:
    assert set(losses(resumed)) == set(range(EPOCHS + 1, MORE_EPOCHS + 1))
    assert draws(resumed, MORE_EPOCHS) == MORE_EPOCHS * TRAIN_IMAGES // BATCH_SIZE


def test_stitches_are_evaluated(tool: Tool, smaller: Callable[..., Path], trained: Path, tmp_path: Path) -> None:
    config, out = smaller("mask-rcnn"), tmp_path / "points.json"
    options = ("--stitches", "S,L,S0-L2", "--out", out, "--metric", "coco/bbox_mAP", "--work-dir", tmp_path / "test")
    tool("test", config, trained / f"epoch_{EPOCHS}.pth", *options)
    points = OperatingPoints.load(out)
    assert [point.name for point in points] == ["S", "L", "S0-L2"]
    assert (points.dataset, points.input_shape) == ("CocoDataset", (96, 96))
    # Of a block of C channels: 12 C^2 weights, 9 C biases, two norms and two layer scales. Of a stem: 16 x 16 patches,
    # 6 x 6 positions, the class token. S and S0-L2 have one stitching layer each, from 32 to 48 channels.
    small, large = (12 * width**2 + 15 * width for width in (32, 48))
    stems, layer = (48 - 32) * (3 * 16**2 + 1 + 6**2 + 1), 32 * 48 + 48
    params = {point.name: point.params for point in points}
    assert params["S0-L2"] - params["S"] == 2 * large - small
    assert params["L"] - params["S"] == stems + 4 * large - 2 * small - layer
    flops = {point.name: point.flops for point in points}
    assert flops["S"] < flops["S0-L2"] < flops["L"]
    for point in points:
        assert {"coco/bbox_mAP", "coco/segm_mAP_50"} <= point.metrics.keys()
        # -1 where no instance is of a size.
        assert all(-1 <= value <= 1 for value in point.metrics.values())

    other = tmp_path / "other.json"
    options = ("--stitches", "S,L,S0-L2", "--out", other, "--work-dir", tmp_path / "other", "--no-prefix-reuse")
    tool("test", config, trained / f"epoch_{EPOCHS}.pth", *options)
    assert other.read_text() == out.read_text()


def test_heads_differ_in_their_own_dicts_alone() -> None:
    """One backbone for every head, and one setting that moves the data."""
    configs = [Config.fromfile(CONFIG.format(head)) for head in HEADS]
    assert len({config.model.type for config in configs}) == len(HEADS)
    for config in configs[1:]:
        assert config.model.backbone == configs[0].model.backbone
    moved = load_config(CONFIG.format("mask-rcnn"), dict(data_root="elsewhere"))
    roots = {moved[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test")}
    assert roots == {"elsewhere"} and "data/coco" not in str(moved.test_evaluator)


@pytest.mark.parametrize("head", ["faster-rcnn", "rtmdet"])
def test_another_head_learns_and_detects(head: str, smaller: Callable[..., Path]) -> None:
    config = load_config(smaller(head))
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = build_model(config)
        model.init_weights()
        for layer in model.backbone.network.layers.values():
            layer.set_base(layer.weight, layer.bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        (batch, *_) = Runner.build_dataloader(config.train_dataloader, seed=0)
        data = model.data_preprocessor(batch, training=True)
        model.train()
        found = []
        for _ in range(24):
            loss, _ = model.parse_losses(model(**data, mode="loss"))
            found.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert sum(found[-8:]) < 0.9 * sum(found[:8]), found
        model.eval()
        (batch, *_) = Runner.build_dataloader(config.val_dataloader, seed=0)
        for stitch in ("S", "S0-L2"):
            model.backbone.set_stitch(stitch)
            (sample,) = model.test_step(batch)
            boxes = sample.pred_instances.bboxes
            assert len(boxes) > 0 and torch.isfinite(boxes).all()
            assert "masks" not in sample.pred_instances
