"""What the configs of SN-Net's five families say, held against what was published (arXiv 2302.06586)."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from timm.data.auto_augment import RandAugment
from timm.layers import DropPath

from mmsnnet.apis import build_uninitialized, load_config
from mmsnnet.models import model_costs
from mmsnnet.registry import TRANSFORMS

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


# The published recipe of each family, a row of the reference's table: epochs; optimizer and decay; rates of anchors and
# layers at the peak, at the start of the warm-up and at the end; clipping; drop path by anchor; mixup, cutmix and
# smoothing; erasing (probability, whether it spares the first half); copies of each image.
NO_MIXING, MIXING = (0.0, 0.0, 0.1), (0.8, 1.0, 0.1)
RECIPES: dict[str, dict[str, Any]] = {
    "deit-ti-s-b_8xb128-50e": dict(
        epochs=50,
        optimizer=("AdamW", 0.05),
        rates=[(1e-4, 1e-7, 1e-6), (1e-4, 1e-7, 1e-6)],
        clip="none",
        drop_path=[0.1, 0.1, 0.1],
        mixing=MIXING,
        erasing=(0.25, False),
        copies=3,
    ),
    "swin-ti-s-b_8xb128-50e": dict(
        epochs=50,
        optimizer=("AdamW", 0.05),
        rates=[(1e-4, 1e-7, 1e-6), (1e-3, 1e-6, 1e-5)],
        clip="norm 5.0",
        drop_path=[0.2, 0.2, 0.2],
        mixing=MIXING,
        erasing=(0.25, False),
        copies=1,
    ),
    "resnet18-50_8xb128-30e": dict(
        epochs=30,
        optimizer=("SGD", 2e-5),
        rates=[(0.005, 1e-6, 0.0), (0.05, 1e-5, 0.0)],
        clip="none",
        drop_path=[0.0, 0.0],
        mixing=NO_MIXING,
        erasing=(0.6, True),
        copies=1,
    ),
    "resnet18-swin-ti_8xb128-30e": dict(
        epochs=30,
        optimizer=("SGD", 2e-5),
        rates=[(0.005, 1e-6, 0.0), (0.05, 1e-5, 0.0)],
        clip="none",
        drop_path=[0.0, 0.1],
        mixing=NO_MIXING,
        erasing=(0.6, True),
        copies=1,
    ),
    "levit-192-256_8xb128-100e": dict(
        epochs=100,
        optimizer=("AdamW", 0.025),
        rates=[(1e-4, 1e-7, 1e-6), (1e-4, 1e-7, 1e-6)],
        clip="agc 0.01",
        drop_path=[0.0, 0.0],
        mixing=MIXING,
        erasing=(0.25, False),
        copies=3,
    ),
}


def rates_of_a_run(config: Config, peak: float) -> list[float]:
    """The rate of a group in each of 4 iterations an epoch."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([dict(params=[parameter], lr=peak)], lr=config.optim_wrapper.optimizer.lr)
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer, epoch_length=4))
        if not scheduler.get("convert_to_iter_based")
        else PARAM_SCHEDULERS.get(scheduler.type).build_iter_from_epoch(
            optimizer=optimizer,
            epoch_length=4,
            **{key: value for key, value in scheduler.items() if key not in ("type", "convert_to_iter_based")},
        )
        for scheduler in config.param_scheduler
    ]
    found = []
    for _ in range(4 * config.train_cfg.max_epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_that_which_was_published(name: str) -> None:
    recipe, config = RECIPES[name], load_config(FOLDER / f"stitched-{name}_imagenet-224x224.py")
    model = build_uninitialized(config)
    assert config.train_cfg.max_epochs == recipe["epochs"] and config.train_dataloader.batch_size == 128

    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    assert type(wrapper.optimizer).__name__ == recipe["optimizer"][0]
    groups = wrapper.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, recipe["optimizer"][1]}
    if recipe["optimizer"][0] == "SGD":
        assert all(group["nesterov"] and group["momentum"] == 0.9 for group in groups)
    clip = wrapper.clip_grad_kwargs
    kind = {torch.nn.utils.clip_grad_norm_: "norm"}.get(getattr(wrapper, "clip_func", None), "agc")
    assert (f"{kind} {next(iter(clip.values()))}" if clip else "none") == recipe["clip"]
    for of_layers, (peak, start, end) in enumerate(recipe["rates"]):
        parts = {group["lr"] for group in groups if (group["part"] == "stitching layers") == of_layers}
        assert len(parts) == 1 and parts.pop() == pytest.approx(peak)
        run = rates_of_a_run(config, peak)
        assert run[0] == pytest.approx(start) and max(run) == pytest.approx(peak)
        assert run.index(max(run)) in (19, 20) and run[-1] == pytest.approx(end, abs=peak / 100)
        assert all(one >= other >= end for one, other in pairwise(run[20:]))

    for anchor, expected in zip(model.backbone.network.anchors, recipe["drop_path"], strict=True):
        rates = [module.drop_prob for module in anchor.modules() if isinstance(module, DropPath)]
        assert max(rates, default=0.0) == pytest.approx(expected)
    mixing = model.mixing
    alphas = (mixing.mixup_alpha, mixing.cutmix_alpha) if mixing.mix_prob else (0.0, 0.0)
    assert (*alphas, mixing.label_smoothing) == recipe["mixing"]
    erasing = model.erasing
    assert (erasing.probability, erasing.num_splits == 2) == recipe["erasing"] and erasing.per_pixel

    (settings,) = (step for step in config.train_dataloader.dataset.pipeline if "TimmTransform" in step.type)
    steps = TRANSFORMS.build(settings).transform.transforms
    (policy,) = (step for step in steps if isinstance(step, RandAugment))
    assert len(policy.ops) == 15 and all(op.magnitude == 9 and op.magnitude_std == 0.5 for op in policy.ops)
    sampler = config.train_dataloader.sampler
    repeated = sampler.type == "mmsnnet.RepeatAugSampler"
    assert (sampler.num_repeats if repeated else 1) == recipe["copies"] and (repeated or sampler.shuffle)
    test = next(step for step in config.test_dataloader.dataset.pipeline if "TimmTransform" in step.type)
    resize, crop, _ = TRANSFORMS.build(test).transform.transforms
    assert (resize.size, tuple(crop.size)) == (256, (224, 224))
