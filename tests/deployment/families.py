"""Tiny configs of each task and family of anchors, with random weights, for the tests of exports."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmsnnet.apis import build_model, load_config

REPOSITORY = Path(__file__).parents[2]
VIT = dict(model="vit_tiny_patch16_224", patch_size=8, num_heads=2)
SIZES = (dict(embed_dim=16, depth=2), dict(embed_dim=24, depth=4))
SWIN = dict(model="swin_tiny_patch4_window7_224", embed_dim=8, num_heads=(1, 2, 4, 8), window_size=4)
RESNET = dict(model="resnet18", layers=(1, 1, 2, 1), channels=(8, 12, 16, 24))
LEVIT = dict(model="levit_128s", key_dim=8, num_heads=(1, 1, 1))
HEAD = dict(
    type="SETRUPHead",
    in_channels=24,
    channels=8,
    num_classes=8,
    norm_cfg=dict(type="BN"),
    num_convs=1,
    up_scale=4,
    kernel_size=1,
    align_corners=False,
    loss_decode=dict(type="CrossEntropyLoss"),
)


def vit(**settings: Any) -> list[dict[str, Any]]:
    """Two plain ViTs of 2 and 4 blocks."""
    return [VIT | size | settings for size in SIZES]


MAPS = 16  # the channels of detectors' maps
# The anchors of each family.
ANCHORS: dict[str, list[dict[str, Any]]] = dict(
    vit=vit(),
    bias=vit(rel_pos_bias=True, window_size=3, global_blocks=(1,)),  # one block of each anchor without windows
    rotary=vit(model="vit_small_patch16_dinov3"),
    mixed=[RESNET | dict(channels=(4, 8, 16, 24)), SWIN | dict(depths=(2, 1, 3, 1))],
    convnext=[
        dict(model="convnext_tiny", dims=(8, 8, 8, 8), depths=(1, 1, 2, 1)),
        dict(model="convnext_tiny", dims=(8, 16, 16, 24), depths=(1, 1, 3, 1)),
    ],
    levit=[
        LEVIT | dict(embed_dim=(8, 12, 16), depth=(1, 2, 1)),
        LEVIT | dict(embed_dim=(12, 16, 24), depth=(1, 3, 1)),
    ],
)


def segmentor(data: Path | None, family: str = "vit", **changes: Any) -> Config:
    """The quickstart's segmentor around tiny anchors, for images of 64 x 64."""
    config = load_config(REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py", _data(data))
    config.model.backbone.anchors = ANCHORS[family]
    config.model.backbone.out_indices = (3,)
    config.model.backbone.rank = 2
    config.model.decode_head = dict(HEAD, in_index=0)
    config.model.auxiliary_head = None
    config.merge_from_dict(changes)
    return config


def classifier(family: str) -> Config:
    """CIFAR-10's classifier around tiny anchors, for images of 64 x 64."""
    config = load_config(REPOSITORY / "configs/imagenet/stitched-vit-s-l_4e_cifar10-32x32.py")
    config.model.backbone.anchors = ANCHORS[family]
    config.model.backbone.img_size = 64
    config.model.backbone.pop("scheme", None)
    return config


def depth_estimator() -> Config:
    """NYUv2's depth estimator around tiny anchors, for images of 64 x 96."""
    config = load_config(REPOSITORY / "configs/nyu/stitched-deit3-s-l_dpt_8xb2-24e_nyu-416x544.py")
    config.model.backbone.anchors = vit()
    config.model.backbone.img_size = (64, 96)
    config.model.backbone.out_indices = (0, 1, 2, 3)
    config.model.test_cfg.update(crop_size=(64, 96), stride=(64, 96))
    config.model.decode_head.update(in_channels=24, channels=8, post_process_channels=(4, 4, 8, 8))
    return config


def detector(name: str) -> Config:
    """A detector of COCO around tiny anchors, for images of 64 x 64."""
    if name == "mask-rcnn":
        config = load_config(REPOSITORY / "configs/coco/stitched-vit-s-l_mask-rcnn_300_coco128-256x256.py")
    elif name == "retinanet":
        return _retinanet()
    else:
        config = load_config(REPOSITORY / f"configs/coco/stitched-deit3-s-l_{name}_8xb8-100e_coco-1024x1024.py")
    config.model.backbone.anchors = vit()
    config.model.backbone.img_size = 64
    config.model.backbone.out_indices = (3,)
    config.model.neck.update(in_channels=24, out_channels=MAPS)
    if name == "rtmdet":
        config.model.bbox_head.update(in_channels=MAPS, feat_channels=MAPS)
    else:
        config.model.rpn_head.update(in_channels=MAPS, feat_channels=MAPS)
        for part in ("bbox", "mask"):
            config.model.roi_head[f"{part}_roi_extractor"].out_channels = MAPS
            config.model.roi_head[f"{part}_head"].update(in_channels=MAPS, conv_out_channels=MAPS)
        config.model.roi_head.bbox_head.fc_out_channels = 16
    return config


def _retinanet() -> Config:
    config = load_config(REPOSITORY / "configs/coco/stitched-convnext-t-s_retinanet_8xb2-ms-crop-3x_coco.py")
    config.model.backbone.anchors = ANCHORS["convnext"]
    config.model.backbone.img_size = 64
    config.model.neck.update(in_channels=[16, 16, 24], out_channels=MAPS)
    config.model.bbox_head.update(in_channels=MAPS, feat_channels=MAPS, stacked_convs=1, num_classes=5)
    return config


def random_checkpoint(config: Config, path: Path) -> Path:
    """A checkpoint whose weights and statistics all count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(config)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                moved = torch.randn_like(tensor) * 0.1
                tensor.add_(moved.abs() if name.endswith("running_var") else moved)
        torch.save({"state_dict": model.state_dict()}, path)
    return path


def _data(data: Path | None) -> dict[str, Any]:
    return {} if data is None else dict(data_root=str(data))
