"""What the configs of SN-Net's five families say, held against what was published (arXiv 2302.06586)."""

from pathlib import Path

import pytest
import timm

from mmsnnet.apis import build_uninitialized, load_config
from mmsnnet.models import model_costs

FOLDER = Path(__file__).parents[2] / "configs/imagenet"
# Stitches, the FLOPs of the first ones by id, and of all together.
PUBLISHED = {
    "deit-ti-s-b_8xb128-50e": (71, [1258411200, 4608338304, 17582740224, 4696010496], 540783841344),
    "swin-ti-s-b_8xb128-50e": (41, [4509194496, 8768534784, 15467826176, 8797436160], 394831724800),
    "resnet18-50_8xb128-30e": (10, [1819065856, 4111512576, 3755463680, 3767505920], 31179469312),
    "resnet18-swin-ti_8xb128-30e": (8, [1819065856, 4509194496, 4095543552, 3730713856], 26222158080),
    "levit-192-256_8xb128-100e": (8, [661663808, 1133412864, 1020918272, 977741824], 7102043264),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_stitches_cost_what_was_published(name: str) -> None:
    model = build_uninitialized(load_config(FOLDER / f"stitched-{name}_imagenet-224x224.py"))
    flops = [cost.flops for cost in model_costs(model).values()]
    assert (len(flops), flops[:4], sum(flops)) == PUBLISHED[name]
    assert len(model.backbone.sampler().bins) == 1  # draws are uniform


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*_imagenet-224x224.py")), ids=lambda path: path.stem)
def test_images_are_normalised_as_in_the_pretraining_of_each_anchor(path: Path) -> None:
    model = load_config(path).model
    for anchor in model.backbone.anchors:
        weights = timm.get_pretrained_cfg(anchor.model)
        assert model.data_preprocessor.mean == pytest.approx([255 * value for value in weights.mean], abs=1e-4)
        assert model.data_preprocessor.std == pytest.approx([255 * value for value in weights.std], abs=1e-4)
