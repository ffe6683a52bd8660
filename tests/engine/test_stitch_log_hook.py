"""The share of FLOPs that is logged is that of the stitch that was drawn."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmsnnet.engine import StitchLogHook
from mmsnnet.models import StitchedBackbone
from mmsnnet.stitching import count_flops


class Deployed(nn.Module):
    """One stitch with the taps of training, its low-rank updates merged."""

    def __init__(self, backbone: StitchedBackbone, stitch: Any) -> None:
        super().__init__()
        self.network, self.stitch, self.taps = backbone.network.merged().eval(), stitch, (1, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network(images, self.stitch, self.taps)


def test_the_share_of_the_drawn_stitch(
    make_backbone: Callable[..., StitchedBackbone], make_images: Callable[..., Tensor]
) -> None:
    backbone, images = make_backbone(out_indices=dict(train=(1, 3), test=(3,))), make_images(1)
    flops = {stitch.id: count_flops(Deployed(backbone, stitch), images) for stitch in backbone.space}
    runner = SimpleNamespace(model=nn.DataParallel(backbone), message_hub=MessageHub("shares"))
    hook = StitchLogHook()
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    assert "train/flops_share" not in runner.message_hub.log_scalars

    drawn = set()
    for iteration in range(12):
        backbone(images)
        hook.after_train_iter(runner, iteration)
        share = runner.message_hub.get_scalar("train/flops_share").current()
        assert share == pytest.approx(flops[backbone.drawn.id] / max(flops.values()), rel=1e-9)
        drawn.add(backbone.drawn.id)
    assert drawn == flops.keys()
    assert len(runner.message_hub.get_scalar("train/flops_share").data[0]) == 12
