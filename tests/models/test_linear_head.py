"""The linear head by the formula: normalise each channel over batch and positions, then classify each position."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from torch import Tensor, nn

from mmsnnet.registry import MODELS

SIZES = (6, 4)
"""Channels of two maps."""


@pytest.fixture
def make_head(randomise: Callable[[nn.Module], None]) -> Callable[..., Any]:
    """``make_head(...)``: a head of three classes on the second of two maps, its parameters moved off their start."""

    def make(**kwargs: Any) -> Any:
        init_default_scope("mmseg")
        chosen = dict(in_channels=SIZES[1], in_index=1) | kwargs
        head = MODELS.build(dict(type="mmsnnet.LinearHead", num_classes=3, dropout_ratio=0.0) | chosen)
        randomise(head)
        return head

    return make


@pytest.fixture
def maps() -> tuple[Tensor, ...]:
    """Maps (2, C, 5, 7), off zero and not of unit variance."""
    generator = torch.Generator().manual_seed(0)
    return tuple(3 + 2 * torch.randn(2, channels, 5, 7, generator=generator) for channels in SIZES)


def classified(head: Any, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Normalisation and the linear map, written out."""
    rows = (x.movedim(1, -1) - mean) / (variance + 1e-5).sqrt() * head.norm.weight + head.norm.bias
    return (rows @ head.conv_seg.weight[:, :, 0, 0].T + head.conv_seg.bias).movedim(-1, 1)


def test_training_normalises_by_the_statistics_of_the_batch(
    make_head: Callable[..., Any], maps: tuple[Tensor, ...]
) -> None:
    head = make_head().train()
    x = maps[1]
    expected = classified(head, x, x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
    torch.testing.assert_close(head(maps), expected)


def test_evaluation_normalises_by_the_running_statistics(
    make_head: Callable[..., Any], maps: tuple[Tensor, ...]
) -> None:
    head = make_head().eval()
    head.norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    head.norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    expected = classified(head, maps[1], head.norm.running_mean, head.norm.running_var)
    torch.testing.assert_close(head(maps), expected)
    # A tap that evaluation mode leaves out is not read.
    torch.testing.assert_close(head((None, maps[1])), expected)


def test_several_maps_are_put_together(make_head: Callable[..., Any], maps: tuple[Tensor, ...]) -> None:
    head = make_head(in_channels=list(SIZES), in_index=[0, 1], input_transform="resize_concat").train()
    x = torch.cat(maps, 1)
    expected = classified(head, x, x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
    torch.testing.assert_close(head(maps), expected)


def test_dropout_acts_in_training_only(make_head: Callable[..., Any], maps: tuple[Tensor, ...]) -> None:
    head = make_head(dropout_ratio=0.5).train()
    assert not torch.equal(head(maps), head(maps))
    head.eval()
    assert torch.equal(head(maps), head(maps))


@pytest.mark.parametrize(
    ("norm", "kind"), [({}, nn.BatchNorm2d), (dict(norm_cfg=dict(type="SyncBN")), nn.SyncBatchNorm)]
)
def test_the_norm_is_the_one_that_the_config_names(
    make_head: Callable[..., Any], norm: dict[str, Any], kind: type
) -> None:
    assert isinstance(make_head(**norm).norm, kind)


def test_its_parameters_are_those_of_a_linear_classifier(make_head: Callable[..., Any]) -> None:
    # Weight and bias of the norm, of the convolution.
    assert sum(p.numel() for p in make_head().parameters()) == 2 * 4 + 4 * 3 + 3


def test_the_loss_is_taken_at_the_size_of_the_labels(make_head: Callable[..., Any], maps: tuple[Tensor, ...]) -> None:
    from mmseg.structures import SegDataSample

    head = make_head().train()
    labels = torch.randint(0, 3, (2, 1, 20, 28), generator=torch.Generator().manual_seed(1))
    labels[0, 0, :5] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    losses = head.loss(maps, samples, None)
    logits = nn.functional.interpolate(head(maps), size=(20, 28), mode="bilinear", align_corners=False)
    picked = -logits.log_softmax(1).gather(1, labels.where(labels != 255, 0))[labels != 255]
    # mmseg divides by the number of all pixels, ignored ones included.
    torch.testing.assert_close(losses["loss_ce"], picked.sum() / labels.numel())
    losses["loss_ce"].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.parameters())
