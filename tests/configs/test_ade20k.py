"""What the ADE20K configs say, held against the weights that they name."""

from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config

from mmsnnet.apis import load_config
from mmsnnet.stitching import create_anchor

FOLDER = Path(__file__).parents[2] / "configs/ade20k"


@pytest.fixture(scope="module", params=sorted(path.name for path in FOLDER.glob("*.py")))
def config(request: pytest.FixtureRequest) -> Config:
    return load_config(FOLDER / request.param)


def test_images_are_normalised_as_in_the_pretraining_of_each_anchor(config: Config) -> None:
    preprocessor = config.model.data_preprocessor
    for anchor in config.model.backbone.anchors:
        weights = timm.get_pretrained_cfg(anchor.model)
        assert preprocessor.bgr_to_rgb
        assert preprocessor.mean == pytest.approx([255 * value for value in weights.mean], abs=1e-4)
        assert preprocessor.std == pytest.approx([255 * value for value in weights.std], abs=1e-4)


def test_no_pixel_of_a_crop_is_padding(config: Config) -> None:
    """The crop, the preprocessor, the window that slides and the backbone agree, on whole patches."""
    crop = next(step for step in config.train_dataloader.dataset.pipeline if step.type == "RandomCrop").crop_size
    side = config.model.backbone.img_size
    sizes = {tuple(crop), tuple(config.model.data_preprocessor.size)}
    if config.model.test_cfg.mode == "slide":
        sizes.add(tuple(config.model.test_cfg.crop_size))
    assert sizes == {(side, side)}
    with torch.device("meta"):
        for anchor in config.model.backbone.anchors:
            settings = {name: value for name, value in anchor.items() if name != "pretrained"}
            built = create_anchor(**(settings | dict(img_size=side)))
            assert built.img_size == built.padded_size((side, side)) == (side, side)
