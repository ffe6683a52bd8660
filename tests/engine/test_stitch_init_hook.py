"""Initialisation before training: on which images, to what, and the same on every rank."""

import copy
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.model import ImgDataPreprocessor
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmsnnet.engine import StitchInitHook
from mmsnnet.errors import SettingError
from mmsnnet.models import StitchedBackbone
from mmsnnet.stitching import NormalEquations
from mmsnnet.stitching.refinement import route_errors

# Patches of 8: eight images of 32 pixels give 136 tokens, more than the widest anchor has channels.
ANCHORS = [
    dict(model="vit_tiny_patch16_224", patch_size=8, embed_dim=width, depth=depth, num_heads=2)
    for width, depth in ((32, 2), (48, 4))
]


class Noisy(Dataset):
    """Random images, augmented by all three global generators; remembers what it gave out."""

    def __init__(self, length: int) -> None:
        self.images = torch.randint(0, 200, (length, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        self.given: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.rand(3, 32, 32) + torch.from_numpy(np.random.rand(3, 1, 1)) + random.random()
        image = (self.images[index] + 15 * noise).to(torch.uint8)
        self.given.append((index, image))
        return dict(inputs=image)

    @property
    def indices(self) -> list[int]:
        return [index for index, _ in self.given]


def make_runner(length: int = 20, rank: int = 0) -> SimpleNamespace:
    """What the hook needs of a runner: the same anchors whatever the rank, and other stitching layers."""
    torch.manual_seed(0)
    backbone = StitchedBackbone(ANCHORS, img_size=32, rank=2)
    torch.manual_seed(1 + rank)
    for parameter in backbone.network.layers.parameters():
        nn.init.normal_(parameter)
    model = nn.Module()
    model.backbone = backbone
    model.data_preprocessor = ImgDataPreprocessor(mean=[127.5] * 3, std=[50.0] * 3)
    loader = SimpleNamespace(dataset=Noisy(length))
    return SimpleNamespace(model=model, train_dataloader=loader, logger=logging.getLogger("test_stitch_init_hook"))


def layers(runner: SimpleNamespace) -> dict[str, Tensor]:
    """Weights and low-rank updates of the stitching layers."""
    return {name: tensor.clone() for name, tensor in runner.model.backbone.network.layers.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def initialised(length: int = 20, **kwargs: Any) -> SimpleNamespace:
    runner = make_runner(length)
    StitchInitHook(**kwargs).before_train(runner)
    return runner


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("num_images", "batch_size"), [(8, 2), (9, 4), (12, 50)])
def test_the_least_squares_of_the_chosen_images(num_images: int, batch_size: int, wrap: bool) -> None:
    runner = make_runner()
    network = copy.deepcopy(runner.model.backbone.network)
    dataset = runner.train_dataloader.dataset
    runner.model = nn.DataParallel(runner.model) if wrap else runner.model
    StitchInitHook(num_images, batch_size).before_train(runner)
    runner.model = runner.model.module if wrap else runner.model

    assert len(set(dataset.indices)) == len(dataset.given) == num_images
    equations = NormalEquations(network)
    equations.add(torch.stack([(image.float() - 127.5) / 50 for _, image in dataset.given]))
    equations.solve()
    assert runner.model.backbone.network.initialized
    for name, expected in network.layers.state_dict().items():
        torch.testing.assert_close(layers(runner)[name], expected, rtol=1e-4, atol=1e-5)


def test_random_states_are_left_alone() -> None:
    runner = make_runner()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    StitchInitHook(8).before_train(runner)
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert len(runner.train_dataloader.dataset.given) == 8
    assert before[0] == after[0]
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])


def test_weights_depend_on_the_seed_alone() -> None:
    first = initialised(num_images=8)
    random.random(), np.random.rand(), torch.rand(1)
    again, other = initialised(num_images=8), initialised(num_images=8, seed=1)
    assert equal(layers(first), layers(again))
    assert not equal(layers(first), layers(other))
    datasets = [runner.train_dataloader.dataset for runner in (first, other)]
    assert set(datasets[0].indices) != set(datasets[1].indices)


def test_more_images_than_there_are() -> None:
    runner = initialised(length=9, num_images=1000)
    assert sorted(runner.train_dataloader.dataset.indices) == list(range(9))
    assert equal(layers(runner), layers(initialised(length=9, num_images=9)))


def test_loaded_layers_cost_no_image() -> None:
    runner = make_runner()
    loaded = layers(runner)
    runner.model.backbone.network.layers.load_state_dict(loaded)
    StitchInitHook().before_train(runner)
    assert equal(layers(runner), loaded) and not runner.train_dataloader.dataset.given


def test_layers_loaded_in_part_are_left_alone() -> None:
    """A checkpoint of a one-way run brings two of the three layers; the third is fitted."""
    runner = make_runner()
    loaded = layers(runner)
    one_way = {name: tensor for name, tensor in loaded.items() if name.startswith("0_")}
    runner.model.backbone.network.layers.load_state_dict(one_way, strict=False)
    StitchInitHook(8).before_train(runner)
    after = layers(runner)
    assert runner.model.backbone.network.initialized
    assert not torch.equal(after["1_1-0_1.weight"], loaded["1_1-0_1.weight"])
    assert equal({name: after[name] for name in one_way}, one_way)


@pytest.mark.parametrize("key", ["num_images", "batch_size"])
@pytest.mark.parametrize("value", [0, -3, True, 2.5, "8", None])
def test_wrong_arguments(key: str, value: Any) -> None:
    text = f"StitchInitHook: {key} must be a whole number of at least 1, got {value!r}"
    with pytest.raises(SettingError, match=f"^{re.escape(text)}$"):
        StitchInitHook(**{key: value})


@pytest.mark.parametrize("value", [-1, 0.5, None])
def test_a_wrong_seed(value: Any) -> None:
    with pytest.raises(SettingError, match=f"StitchInitHook: seed must be a whole number of at least 0, got {value}"):
        StitchInitHook(seed=value)


def test_one_stitch_cannot_be_initialised() -> None:
    runner = make_runner()
    runner.model.backbone = StitchedBackbone(ANCHORS, img_size=32, rank=2, only="S0-L2")
    with pytest.raises(SettingError, match=r"one stitch lacks blocks .* load its checkpoint \(load_from\)"):
        StitchInitHook(8).before_train(runner)


def test_pretrained_weights_that_are_not_finite() -> None:
    runner = make_runner()
    for parameter in runner.model.backbone.network.anchor(0).parameters():
        nn.init.constant_(parameter, torch.nan)
    with pytest.raises(SettingError, match="not finite: check its pretrained weights"):
        StitchInitHook(8).before_train(runner)


# Several ranks


def run_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    logging.basicConfig(filename=f"{folder}/rank_{rank}.log", level=logging.INFO)
    runner = make_runner(rank=rank)
    StitchInitHook(num_images=9, batch_size=2).before_train(runner)
    torch.save((runner.train_dataloader.dataset.indices, layers(runner)), f"{folder}/rank_{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_every_rank_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.syspath_prepend(pytestconfig.rootpath)  # where the processes find this file
    torch.multiprocessing.start_processes(run_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    (own, first), (others, second) = (torch.load(tmp_path / f"rank_{rank}.pth") for rank in range(2))
    assert equal(first, second)

    alone = initialised(num_images=9, batch_size=2)
    assert sorted([*own, *others]) == sorted(alone.train_dataloader.dataset.indices)
    assert {len(own), len(others)} == {4, 5}
    for name, expected in layers(alone).items():  # float64 sums, added up in another order
        torch.testing.assert_close(first[name], expected, rtol=1e-6, atol=1e-6)
    for rank in range(2):  # in total, not of this rank
        assert "initialised 3 stitching layers from 9 images" in (tmp_path / f"rank_{rank}.log").read_text()


def test_one_ranks_images_alone_give_other_weights() -> None:
    """Else the test above would not see sums that are not reduced."""
    whole, half = initialised(num_images=9, batch_size=2), make_runner()
    chosen = np.random.default_rng(0).permutation(20)[:9][::2]
    equations = NormalEquations(half.model.backbone.network)
    for index in chosen:
        equations.add((half.train_dataloader.dataset[int(index)]["inputs"].float()[None] - 127.5) / 50)
    equations.solve()
    differences = [(layers(whole)[name] - own).abs().max() for name, own in layers(half).items() if "weight" in name]
    assert len(differences) == 3 and min(differences) > 0.01


def test_the_ranks_start_apart() -> None:
    """Else the test above would not see a rank that keeps its own low-rank update."""
    make: Callable[[int], dict[str, Tensor]] = lambda rank: layers(make_runner(rank=rank))  # noqa: E731
    assert not equal(make(0), make(1))


def test_the_second_stage_trains_the_solved_layers_on_batches_of_its_own() -> None:
    solved, refined = initialised(num_images=8), initialised(num_images=8, refine=dict(steps=12, lr=1e-2))
    seen = refined.train_dataloader.dataset.indices
    assert len(seen) == 8 + 12 * 2 and seen[:8] == solved.train_dataloader.dataset.indices
    assert len(set(seen[8:])) == 20  # each of the 20 images once before any comes again
    assert not equal(layers(solved), layers(refined))
    assert equal(layers(refined), layers(initialised(num_images=8, refine=dict(steps=12, lr=1e-2))))
    images = refined.model.data_preprocessor(dict(inputs=list(refined.train_dataloader.dataset.images[:6])))["inputs"]
    totals = []
    for runner in (solved, refined):
        network = runner.model.backbone.network.eval()
        stitches = [stitch for stitch in network.space if stitch.layers]
        totals.append(sum(float(error) for _, error in route_errors(network, images, stitches)))
    assert totals[1] < totals[0]


def test_the_second_stage_leaves_loaded_layers_alone() -> None:
    whole, runner = initialised(num_images=8), make_runner()
    space = runner.model.backbone.space
    crossed = {str(key) for stitch in space for key in stitch.layers}  # the others serve taps alone
    loaded = sorted(crossed)[:1]
    for name in loaded:
        runner.model.backbone.network.layers[name].load_state_dict(
            whole.model.backbone.network.layers[name].state_dict()
        )
    StitchInitHook(8, refine=dict(steps=4, lr=1e-2)).before_train(runner)
    for name, tensor in layers(runner).items():
        solved = layers(whole)[name]
        if name.rpartition(".")[0] in loaded:
            assert torch.equal(tensor, solved)
        elif name.endswith("weight"):
            assert torch.equal(tensor, solved) is (name.rpartition(".")[0] not in crossed)


@pytest.mark.parametrize(
    ("refine", "text"),
    [
        (True, "refine must be a dict such as dict(steps=300), got True"),
        ([300], "refine must be a dict such as dict(steps=300), got [300]"),
        ({}, "refine needs 'steps'"),
        (dict(lr=1e-3), "refine needs 'steps'"),
        (
            dict(steps=3, rate=1),
            "refine has an unknown key 'rate'; it takes steps, lr, stitches_per_step, seed",
        ),
        *(
            (dict(dict(steps=3), **{key: value}), f"refine.{key} must be a whole number of at least 1, got {value!r}")
            for key in ("steps", "stitches_per_step")
            for value in (0, -1, True, 2.5, "3", None)
        ),
        *(
            (dict(steps=3, lr=lr), f"refine.lr must be a finite number above 0, got {lr!r}")
            for lr in (0, -1e-3, float("inf"), float("nan"), True, "1e-3", None)
        ),
        *(
            (dict(steps=3, seed=seed), f"refine.seed must be a whole number, got {seed!r}")
            for seed in (0.5, True, "0", None)
        ),
    ],
)
def test_settings_of_the_second_stage(refine: Any, text: str) -> None:
    with pytest.raises(SettingError, match=f"^{re.escape(f'StitchInitHook: {text}')}$"):
        StitchInitHook(refine=refine)


def test_a_second_stage_that_diverges() -> None:
    runner = make_runner()
    with pytest.raises(SettingError, match=r"no finite number .*: lower refine\.lr, now 1e\+30"):
        StitchInitHook(8, refine=dict(steps=4, lr=1e30)).before_train(runner)
