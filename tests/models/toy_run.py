"""A model of one layer and its runs, for tests of checkpoints."""

from pathlib import Path
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn


class Toy(BaseModel):
    """A model of one layer, for a runner to train in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs: list[Tensor], data_samples: Any = None, mode: str = "tensor") -> Any:
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


def toy_runner(work_dir: Path, **settings: Any) -> Runner:
    return Runner(
        Toy(),
        str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=[dict(inputs=torch.ones(2) * index) for index in range(4)],
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.1)),
        param_scheduler=[dict(type="MultiStepLR", milestones=[1]), dict(type="PolyLR", power=0.9, end=2)],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        custom_hooks=[dict(type="EMAHook")],
        experiment_name=work_dir.name,
        default_scope="mmengine",
        log_level="ERROR",
        **settings,
    )


def same(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same."""
    if isinstance(one, HistoryBuffer):
        return type(other) is HistoryBuffer and all(map(same, one.data, other.data))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool((torch.as_tensor(one) == torch.as_tensor(other)).all()) if hasattr(one, "shape") else one == other
