"""Whose weights the anchors have at the first iteration of a runner: the pretrained ones, unless a checkpoint is loaded
or resumed, in one process and on both ranks of two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mmsnnet.registry import MODELS
from mmsnnet.stitching import create_anchor

SIZES, CLASSES = (dict(embed_dim=32, depth=2), dict(embed_dim=48, depth=4)), 6
# The first process trains three times alone, then three times with the second one. Each writes what it finds before
# each iteration: the anchors' weights by anchor and name.
PROGRAM = """
import os, sys
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

import mmsnnet
from mmsnnet.models import find_stitched_backbone

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
model = torch.load(folder / "model.pt")


class Recorder(Hook):
    def __init__(self, name):
        self.name = name

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        assert isinstance(runner.model, MMDistributedDataParallel) == (runner.world_size > 1)
        network = find_stitched_backbone(runner.model).network
        weights = [{k: v.clone() for k, v in anchor.model.state_dict().items()} for anchor in network.anchors]
        torch.save(weights, folder / f"{self.name} {runner.iter} {runner.world_size} {rank}.pt")


def train(name, ranks, iterations, work_dir, **settings):
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = [dict(inputs=image, data_samples=BaseDataElement(gt_label=i % 6)) for i, image in enumerate(images)]
    Runner(
        model,
        work_dir,
        train_dataloader=dict(
            batch_size=2, dataset=data, sampler=dict(type="InfiniteSampler"), collate_fn=dict(type="pseudo_collate")
        ),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2)),
        param_scheduler=dict(type="LinearLR", start_factor=0.5, by_epoch=False, end=3),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=2, by_epoch=False)),
        custom_hooks=[dict(type="mmsnnet.StitchInitHook", num_images=8), Recorder(name)],
        randomness=dict(seed=0, diff_rank_seed=True),
        launcher="pytorch" if ranks > 1 else "none",
        cfg=dict(model_wrapper_cfg=dict(  # the runner's own is for GPUs
            type="MMDistributedDataParallel", device_ids=None, find_unused_parameters=True
        )),
        experiment_name=f"{name} {ranks}",
        default_scope="mmsnnet",
        log_level="ERROR",
        **settings,
    ).train()


def train_all(ranks):
    work, other = str(folder / f"work {ranks}"), str(folder / f"other {ranks}")
    train("fresh", ranks, 3, work)
    train("load_from", ranks, 2, other, load_from=str(folder / "other.pth"))
    train("resume", ranks, 3, work, load_from=work + "/iter_2.pth", resume=True)


if rank == 0:
    train_all(ranks=1)
os.environ["LOCAL_RANK"] = str(rank)
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
train_all(ranks=2)
# A rank that leaves while gloo's threads run may end by a signal.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def randomised(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return module


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


Weights = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def folder_and_weights(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> tuple[Path, dict[str, Weights]]:
    """The folder that the two processes leave, and the anchors' weights in the files: ``pretrained``, and ``other`` of
    the checkpoint to load."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [dict(model="vit_tiny_patch16_224", num_heads=2, patch_size=8, **size) for size in SIZES]
    pretrained: Weights = []
    for index, setting in enumerate(settings):
        anchor = randomised(create_anchor(img_size=32, classifier=True, num_classes=CLASSES, **setting), seed=index)
        pretrained.append(anchor.model.state_dict())
    torch.save(pretrained[0], folder / "0.pth")
    safetensors.torch.save_file(pretrained[1], folder / "1.safetensors")
    for setting, file in zip(settings, ("0.pth", "1.safetensors"), strict=True):
        setting["pretrained"] = str(folder / file)
    backbone = dict(type="mmsnnet.StitchedViT", anchors=settings, img_size=32, rank=2, flops_step=1e5)
    model = dict(
        type="mmsnnet.StitchedClassifier",
        backbone=backbone,
        num_classes=CLASSES,
        data_preprocessor=dict(type="ImgDataPreprocessor", mean=[127.5] * 3, std=[60.0] * 3),
    )
    torch.save(model, folder / "model.pt")
    other = randomised(MODELS.build(model), seed=2)
    torch.save({"state_dict": other.state_dict()}, folder / "other.pth")

    run_ranks("-c", PROGRAM, folder)
    anchors = [anchor.model.state_dict() for anchor in other.backbone.network.anchors]
    return folder, {"pretrained": pretrained, "other": anchors}


@pytest.fixture(params=[1, 2], ids=["alone", "two ranks"])
def runs(request: pytest.FixtureRequest, folder_and_weights: tuple[Path, dict[str, Weights]]) -> dict[str, Any]:
    """What each rank found, as ``{'<run> <iteration>': [weights of rank 0, ...]}``, beside the weights in the files."""
    folder, weights = folder_and_weights
    names = {path.stem.removesuffix(f" {request.param} 0") for path in folder.glob(f"* {request.param} 0.pt")}
    ranks = range(request.param)
    return weights | {
        name: [torch.load(folder / f"{name} {request.param} {rank}.pt") for rank in ranks] for name in names
    }


@pytest.mark.slow
def test_every_iteration_was_seen_on_every_rank(runs: dict[str, Any]) -> None:
    expected = {"fresh 0", "fresh 1", "fresh 2", "load_from 0", "load_from 1", "resume 2"}
    assert set(runs) == expected | {"pretrained", "other"}


def test_a_fresh_run_starts_from_the_pretrained_weights(runs: dict[str, Any]) -> None:
    for weights in runs["fresh 0"]:
        assert equal(weights, runs["pretrained"])


def test_training_moves_the_anchors_alike_on_every_rank(runs: dict[str, Any]) -> None:
    first, second, third = (runs[f"fresh {iteration}"] for iteration in range(3))
    assert not equal(first[0], second[0]) and not equal(second[0], third[0])
    assert all(equal(weights, third[0]) for weights in third)


def test_a_checkpoint_to_load_comes_before_the_pretrained_weights(runs: dict[str, Any]) -> None:
    for weights in runs["load_from 0"]:
        assert equal(weights, runs["other"]) and not equal(weights, runs["pretrained"])


def test_a_resumed_run_goes_on_from_the_weights_it_had(runs: dict[str, Any]) -> None:
    for resumed, before in zip(runs["resume 2"], runs["fresh 2"], strict=True):
        assert equal(resumed, before) and not equal(resumed, runs["pretrained"])
