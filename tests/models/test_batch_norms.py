"""Batch norms in training: synchronised or not, frozen, with several stitches a step, on two ranks, before training."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.model import convert_sync_batchnorm
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmsnnet.stitching import NormalEquations, StitchedNetwork, StitchSpace
from mmsnnet.stitching.anchors.base import STEM, Component
from tests.models.test_recalibration import make
from tests.stitching.anchors.test_staged import images
from tests.stitching.anchors.test_staged import make as make_anchor


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [inner for inner in module.modules() if isinstance(inner, _BatchNorm)]


@pytest.mark.parametrize("family", ["resnet", "resnetv2", "regnet", "efficientnet", "mobilenetv3", "levit"])
@torch.no_grad()
def test_a_conversion_to_synchronised_norms_changes_no_output(family: str) -> None:
    """mmengine's ``sync_bn`` knows nothing of timm's norms that have an activation in them."""
    settings = dict(norm_layer=nn.BatchNorm2d) if family == "resnetv2" else {}
    anchor = make_anchor(family, **settings)
    x, before = images(anchor), copy.deepcopy(anchor.state_dict())
    logits, maps = anchor.model(x), [features.data for _, features in anchor.run(anchor.stem(x))]
    converted = convert_sync_batchnorm(anchor).train().eval()
    assert norms(converted) and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms(converted))
    assert converted.model(x).equal(logits)
    assert all(map(torch.equal, maps, [features.data for _, features in converted.run(converted.stem(x))]))
    after = converted.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("synchronised", [False, True])
@pytest.mark.parametrize("blocks", [0, 2, None])
def test_frozen_norms_keep_their_statistics(blocks: int | None, synchronised: bool) -> None:
    anchor = make_anchor("resnet")
    anchor.freeze(blocks)
    anchor = convert_sync_batchnorm(anchor) if synchronised else anchor
    anchor.train()
    frozen = [STEM, *(Component("block", block) for block in range(blocks or 0))]
    parameters = (
        {p for part in frozen for p in anchor.parameters_of(part)} if blocks is not None else {*anchor.parameters()}
    )
    for norm in norms(anchor):
        assert norm.training == norm.weight.requires_grad == (norm.weight not in parameters)
    if not synchronised:
        before = copy.deepcopy(anchor.state_dict())
        for _ in anchor.run(anchor.stem(images(anchor))):
            pass
        moved = {name for name, tensor in anchor.state_dict().items() if not torch.equal(tensor, before[name])}
        names = {name for name, norm in anchor.named_modules() if isinstance(norm, _BatchNorm) and norm.training}
        assert {name.rpartition(".")[0] for name in moved} == names


def test_least_squares_leaves_statistics_alone() -> None:
    """In training mode, from which a run starts: the anchors run in evaluation mode."""
    anchors = [make_anchor("resnet", False), make_anchor("resnet", False, layers=(2, 2, 3, 2))]
    network = StitchedNetwork(anchors, StitchSpace.two_way([anchor.stages for anchor in anchors]), rank=2).train()
    before = copy.deepcopy(dict(network.named_buffers()))
    equations = NormalEquations(network)
    equations.add(images(anchors[0], 8))
    equations.solve()
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers() if "running" in name)
    assert all(norm.training for norm in norms(network))


def loss(model: nn.Module, inputs: Tensor) -> Tensor:
    samples = [BaseDataElement() for _ in inputs]
    for index, sample in enumerate(samples):
        sample.gt_label = index % 4
    return model(inputs=inputs, data_samples=samples, mode="loss")["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("with_cp", [False, True])
def test_each_pass_updates_the_norms_on_its_route_once(with_cp: bool) -> None:
    model = make(with_cp=with_cp).train()
    backbone, counts = model.backbone, dict.fromkeys(norms(model), 0)
    for _ in range(3):
        loss(model, torch.randn(2, 3, 64, 64)).backward()
        used = {*backbone.trained_parameters(backbone.drawn)}
        counts |= {norm: count + (norm.weight in used) for norm, count in counts.items()}
    assert len({*counts.values()}) > 1
    assert counts == {norm: int(norm.num_batches_tracked) for norm in counts}


PROGRAM = """
import copy
import sys

import torch

from mmsnnet.models import StitchedDataParallel
from tests.models.test_batch_norms import loss, norms
from tests.models.test_recalibration import make

folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
model = make(with_cp=True).train()
alone, wrapper = copy.deepcopy(model), StitchedDataParallel(model)
images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(rank))
for step in range(2):
    for one, wrapped in ((alone, alone), (model, wrapper)):
        torch.manual_seed(rank)  # of dropout and drop path
        loss(wrapped, images).backward()
    assert model.backbone.drawn.name == alone.backbone.drawn.name
    for own, averaged in zip(alone.parameters(), model.parameters()):
        assert (own.grad is None) == (averaged.grad is None)
        if own.grad is not None:
            torch.distributed.all_reduce(own.grad)
            torch.testing.assert_close(averaged.grad, own.grad / 2)
            own.grad = averaged.grad = None
    # Each rank has the statistics of its own images, as in DistributedDataParallel with broadcast_buffers=False.
    assert all(map(torch.equal, alone.buffers(), model.buffers()))
torch.save([norm.running_mean for norm in norms(model)], f"{folder}/rank_{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_average_gradients_and_keep_their_own_statistics(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks("-c", PROGRAM, tmp_path)
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2))
    assert not all(map(torch.equal, first, second))
