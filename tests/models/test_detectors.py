"""Boxes and masks of images that are not whole patches: detectors count in strides, and padding changes nothing."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample

from mmsnnet.apis import build_model, load_config

pytestmark = pytest.mark.detection

CONFIG = Path(__file__).parents[2] / "configs/coco/vit-s_mask-rcnn_300_coco128-256x256.py"


@pytest.mark.parametrize("size", [(70, 101), (33, 64)])
def test_a_detector_finds_what_it_finds_in_the_padded_image(size: tuple[int, int]) -> None:
    model = build_model(
        load_config(CONFIG, {"model.test_cfg.rcnn.score_thr": 0.0})
    )  # random weights are sure of nothing
    patch = model.backbone.padded_size((1, 1))[0]
    height, width = size
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    padded = F.pad(image, (0, -width % patch, 0, -height % patch))
    assert padded.shape != image.shape
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=meta)]
    with torch.no_grad():
        found, expected = (
            model.predict(images, copy.deepcopy(samples))[0].pred_instances for images in (image, padded)
        )
    assert len(found) and torch.equal(found.bboxes, expected.bboxes) and torch.equal(found.masks, expected.masks)
    assert found.masks.shape[-2:] == size
