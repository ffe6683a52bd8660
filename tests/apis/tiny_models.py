"""Tiny stitched models of every task with random weights, published with a front, and images for them."""

from dataclasses import replace
from pathlib import Path

import torch

from mmsnnet.apis import build_model, count_stitches, load_config, publish_model
from mmsnnet.datasets import write_shapes

REPOSITORY = Path(__file__).parents[2]
LAYOUTS = dict(segmentation="shapes", depth="nyu", classification="imagenet", detection="coco")
METRICS = dict(segmentation="mIoU", depth="d1", classification="accuracy/top1", detection="coco/bbox_mAP")

ANCHORS = """
anchors = [
    dict(model="deit3_small_patch16_224", embed_dim=32, depth=2, num_heads=2, init_values=1.0{more[0]}),
    dict(model="deit3_small_patch16_224", embed_dim=48, depth=4, num_heads=2, init_values=1.0{more[1]}),
]
loader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root={data!r}))
test_dataloader = loader
"""
CONFIGS = dict(
    segmentation="""
_base_ = "{configs}/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"
""",
    depth="""
_base_ = "{configs}/nyu/stitched-deit3-s-l_dpt_8xb2-24e_nyu-416x544.py"
model = dict(
    data_preprocessor=dict(size=(64, 96)),
    backbone=dict(anchors=anchors, img_size=(64, 96), out_indices=(0, 1, 2, 3), rank=2, flops_step=5e6),
    decode_head=dict(in_channels=48, channels=16, post_process_channels=(8, 8, 16, 16)),
)
""",
    classification="""
_base_ = "{configs}/imagenet/stitched-vit-s-l_4e_cifar10-32x32.py"
""",
    detection="""
_base_ = "{configs}/coco/stitched-deit3-s-l_faster-rcnn_8xb8-100e_coco-1024x1024.py"
model = dict(
    data_preprocessor=dict(pad_size_divisor=96),
    backbone=dict(anchors=anchors, img_size=96, rank=2, flops_step=1e6),
    neck=dict(in_channels=48, out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, conv_out_channels=32, fc_out_channels=64),
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50), rcnn=dict(score_thr=0.0, max_per_img=10)),
)
resize = dict(type="Resize", scale=(96, 96), keep_ratio=True)
meta_keys = ("img_id", "img_path", "ann_file", "ori_shape", "img_shape", "scale_factor")
pipeline = [dict(type="LoadImageFromFile"), resize, dict(type="PackDetInputs", meta_keys=meta_keys)]
loader["dataset"]["pipeline"] = pipeline
test_pipeline = pipeline
""",
)


def publish_tiny(task: str, folder: Path) -> Path:
    """Publish a model of a task in ``folder / "published"``, and write its data set in ``folder / "data"``.

    The metric of its front grows with FLOPs; the latencies are FLOPs in other units.
    """
    size = (64, 64) if task == "segmentation" else (32, 32) if task == "classification" else (64, 96)
    write_shapes(folder / "data", LAYOUTS[task], 10, 10 if task == "classification" else 4, size)
    windows = [", window_size=2, global_blocks=(1,)", ", window_size=2, global_blocks=(1, 3)"]
    more = windows if task == "detection" else ["", ""]
    path = folder / f"{task}.py"
    text = CONFIGS[task] + ANCHORS
    if "anchors=anchors" in text:  # a config defines names before it uses them
        base, rest = CONFIGS[task].strip().split("\n", 1)
        text = f"{base}\n{ANCHORS}{rest}"
    else:
        text = CONFIGS[task] + ANCHORS.split("]\n")[1]
    text = text.replace("{configs}", str(REPOSITORY / "configs")).replace("{data!r}", repr(str(folder / "data")))
    path.write_text(text.replace("{more[0]}", more[0]).replace("{more[1]}", more[1]))
    config = load_config(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    torch.save({"state_dict": model.state_dict()}, folder / "model.pth")
    points = count_stitches(config, model)
    measured = (
        replace(point, metrics={METRICS[task]: point.flops / 1e9}, latency_ms=point.flops / 1e6) for point in points
    )
    replace(points, points=tuple(measured)).save(folder / "points.json")
    publish_model(config, folder / "model.pth", folder / "published", folder / "points.json")
    return folder / "published"
