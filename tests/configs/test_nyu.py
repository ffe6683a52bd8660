"""What the NYUv2 configs say, held against what was published."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from mmengine.structures import BaseDataElement
from mmseg.registry import DATASETS, TRANSFORMS
from torch import nn

from mmsnnet.apis import load_config

REPOSITORY = Path(__file__).parents[2]
DPT_CONFIGS = sorted(REPOSITORY.glob("configs/nyu/*_dpt_*.py"))
ITERATIONS = 100  # in an epoch


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(REPOSITORY / "configs/nyu/stitched-deit3-s-l_dpt_8xb2-24e_nyu-416x544.py")


class Stitched(nn.Module):
    """A weight of an anchor and one of a head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


def one_cycle(step: int, highest: float) -> float:
    """Smith's one cycle as PyTorch has it: up a cosine from a 25th of the highest rate, down to a 100th of that."""
    up, total = 0.3 * 24 * ITERATIONS, 24 * ITERATIONS
    low, share = (highest / 25, 1 - step / up) if step < up else (highest / 2500, (step - up) / (total - up))
    return low + (highest - low) * (1 + math.cos(math.pi * share)) / 2


def test_the_learning_rates_make_one_cycle(config: Config, make_backbone: Any) -> None:
    """Each group of parameters has a highest rate of its own."""
    settings = config.optim_wrapper.copy()
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(type=settings.pop("constructor"), paramwise_cfg=settings.pop("paramwise_cfg"), optim_wrapper_cfg=settings)
    )
    optimizer = constructor(Stitched(make_backbone())).optimizer
    highest = {"anchor 0": 2e-6, "anchor 1": 2e-6, "stitching layers": 2e-6, "head": 2e-5}
    assert {group["part"] for group in optimizer.param_groups} == set(highest)
    schedulers = []
    for scheduler in config.param_scheduler.copy():
        of = PARAM_SCHEDULERS.get(scheduler.pop("type"))
        assert scheduler.pop("convert_to_iter_based")
        schedulers.append(of.build_iter_from_epoch(optimizer, **scheduler, epoch_length=ITERATIONS))
    for step in range(24 * ITERATIONS):
        if step % 60 == 0:
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(one_cycle(step, highest[group["part"]]), rel=1e-4), step
        for scheduler in schedulers:
            scheduler.step()
    assert group["lr"] == pytest.approx(2e-5 / 2500, rel=1e-2)


def test_the_published_settings(config: Config) -> None:
    assert config.train_cfg.max_epochs == 24 and config.optim_wrapper.clip_grad.max_norm == 35
    assert (config.optim_wrapper.optimizer.type, config.optim_wrapper.optimizer.weight_decay) == ("AdamW", 0.01)
    assert config.train_dataloader.batch_size == 2
    assert config.model.decode_head.loss_decode.warm_up_iters == 100
    assert (config.model.decode_head.readout_type, config.model.decode_head.channels) == ("project", 256)
    assert tuple(config.model.decode_head.post_process_channels) == (96, 192, 384, 768)
    assert config.test_evaluator.crop_type == "nyu_crop" and config.model.test_cfg.mode == "slide_flip"
    for limits in (
        (config.model.decode_head.min_depth, config.model.decode_head.max_depth),
        (config.test_evaluator.min_depth_eval, config.test_evaluator.max_depth_eval),
    ):
        assert limits == (1e-3, 10)
    assert config.model.data_preprocessor.mean == config.model.data_preprocessor.std == [127.5] * 3


def test_the_published_augmentations(config: Config) -> None:
    steps = {step.type: step for step in config.train_dataloader.dataset.pipeline}
    assert steps["RandomRotate"].degree == 2.5 and "RandomFlip" in steps
    assert tuple(steps["RandomCrop"].crop_size) == (416, 544)
    color = TRANSFORMS.build(steps["mmsnnet.RandomColor"])
    assert (color.gamma, color.brightness, color.color) == ((0.9, 1.1), (0.75, 1.25), (0.9, 1.1))


@pytest.mark.parametrize("path", DPT_CONFIGS, ids=lambda path: path.stem)
def test_the_taps(path: Path) -> None:
    """Of the small anchor the same four blocks, whatever the large one."""
    backbone = load_config(path).model.backbone
    assert backbone.rank == 16
    depth = 24 if "large" in backbone.anchors[-1].model else 12
    assert tuple(backbone.out_indices) == ((4, 11, 17, 23) if depth == 24 else (2, 5, 8, 11))
    assert [index * 12 // depth for index in backbone.out_indices] == [2, 5, 8, 11]


# The data set


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An image for training, and its depth from 1 to 2 m, in a folder of NYUv2's layout."""
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    depth = np.linspace(1000, 2000, 480 * 640).reshape(480, 640).astype(np.uint16)
    for folder, suffix, values in (("images", "jpg", image), ("annotations", "png", depth)):
        (tmp_path / folder / "train").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / folder / "train" / f"kitchen_0001_00001.{suffix}"), values)
    return tmp_path


def build(config: Config, root: Path) -> Any:
    return DATASETS.build(config.train_dataloader.dataset | dict(data_root=str(root)))


def test_a_sample_for_training(config: Config, data: Path) -> None:
    (sample,) = build(config, data)
    assert sample["inputs"].shape == (3, 416, 544) and sample["inputs"].dtype == torch.uint8
    depth = sample["data_samples"].gt_depth_map.data
    measured = depth > 0
    assert depth.shape == (1, 416, 544) and depth.dtype == torch.float32
    assert measured.float().mean() > 0.9 and depth[measured].min() >= 1 and depth.max() <= 2
    assert isinstance(sample["data_samples"], BaseDataElement)
    assert sample["data_samples"].depth_map_path.endswith("annotations/train/kitchen_0001_00001.png")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("annotations/train/kitchen_0001_00001.png", np.zeros((480, 640), np.uint16), "between 0 and 10.0 m"),
        ("images/train/kitchen_0001_00001.jpg", b"no image", "expected an image"),
    ],
)
def test_a_wrong_file_stops_the_training(
    file: str, content: np.ndarray | bytes, message: str, config: Config, data: Path
) -> None:
    """Rather than another sample taking its place."""
    encoded = content if isinstance(content, bytes) else cv2.imencode(".png", content)[1].tobytes()
    (data / file).write_bytes(encoded)
    with pytest.raises(ValueError) as error:
        build(config, data)[0]
    assert file in str(error.value) and message in str(error.value)
