"""What the ADE20K configs say, held against the weights that they name."""

from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config

from mmsnnet.apis import build_space, build_uninitialized, load_config
from mmsnnet.errors import SettingError
from mmsnnet.models import model_costs
from mmsnnet.stitching import Anchor, create_anchor

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


def test_deit_becomes_swin_by_anchors_stages_and_channels() -> None:
    """The pyramid that plain ViTs need goes, and an error says so."""
    config = load_config(FOLDER / "stitched-deit3-s-l_upernet_8xb2-160k_ade20k-512x512.py")
    backbone = config.model.backbone
    backbone.anchors = [dict(model=f"swin_{size}_patch4_window7_224.ms_in22k_ft_in1k") for size in ("tiny", "small")]
    backbone.out_indices = (0, 1, 2, 3)
    config.model.decode_head.in_channels = [96, 192, 384, 768]
    config.model.auxiliary_head.in_channels = 384
    with pytest.raises(SettingError, match=r"neck\.embed_dim is 1024.* 96, 192, 384, 768 .*set model\.neck=None"):
        build_space(config)
    config.model.neck = None
    space = build_space(config)
    assert space.stages == ((2, 2, 6, 2), (2, 2, 18, 2))
    model = build_uninitialized(config)
    costs = model_costs(model, (64, 64))
    assert len(costs) == len(space) and costs[0].flops < costs[1].flops
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64), mode="tensor").shape == (1, 150, 16, 16)


@pytest.fixture(scope="module")
def built() -> dict[str, Anchor]:
    """Anchors on the meta device by their settings, which configs of several heads share."""
    return {}


def test_no_pixel_of_a_crop_is_padding(config: Config, built: dict[str, Anchor]) -> None:
    """The crop, the preprocessor, the window that slides and the backbone agree, on whole patches."""
    crop = next(step for step in config.train_dataloader.dataset.pipeline if step.type == "RandomCrop").crop_size
    side = config.model.backbone.img_size
    sizes = {tuple(crop), tuple(config.model.data_preprocessor.size)}
    if config.model.test_cfg.mode == "slide":
        sizes.add(tuple(config.model.test_cfg.crop_size))
    assert sizes == {(side, side)}
    with torch.device("meta"):
        for anchor in config.model.backbone.anchors:
            settings = {name: value for name, value in anchor.items() if name != "pretrained"} | dict(img_size=side)
            key = str(settings)
            if key not in built:
                built[key] = create_anchor(**settings)
            assert built[key].img_size == built[key].padded_size((side, side)) == (side, side)
