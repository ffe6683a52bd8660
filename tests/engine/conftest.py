"""A set of five images, and runs of the loops over stitches on it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from mmsnnet.datasets import write_shapes
from mmsnnet.datasets.procedural.shapes import CLASSES, PALETTE
from mmsnnet.models import find_stitched_backbone

MakeRunner = Callable[..., Runner]
NUMBERS = itertools.count()
COSTS: dict[str, Any] = {}  # of the backbone of each model, counted once


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", "shapes", train=4, val=5, size=(32, 32))


@pytest.fixture
def make_runner(
    data_root: Path,
    segmentor_config: Callable[..., dict[str, Any]],
    randomise: Callable[[nn.Module], None],
    tmp_path: Path,
) -> MakeRunner:
    """``make_runner(...)``: a runner with a random model and initialised layers; keywords are those of the config."""

    def loader(split: str, **kwargs: Any) -> dict[str, Any]:
        dataset = dict(
            type="BaseSegDataset",
            data_root=str(data_root),
            metainfo=dict(name="shapes", classes=CLASSES, palette=[list(colour) for colour in PALETTE]),
            img_suffix=".jpg",
            seg_map_suffix=".png",
            reduce_zero_label=True,
            data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}"),
            pipeline=[dict(type=name) for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")],
        )
        return dict(batch_size=2, num_workers=0, dataset=dataset, **kwargs)

    def make(initialized: bool = True, **kwargs: Any) -> Runner:
        test = loader("validation", sampler=dict(type="DefaultSampler", shuffle=False))
        config = dict(
            default_scope="mmseg",
            model=segmentor_config(),
            work_dir=str(tmp_path / "work_dir"),
            experiment_name=f"loops_{next(NUMBERS)}",
            randomness=dict(seed=0),
            train_dataloader=loader("training", sampler=dict(type="InfiniteSampler", shuffle=True)),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=1, val_interval=1),
            optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1e-3)),
            val_dataloader=test,
            val_cfg=dict(type="mmsnnet.StitchValLoop", stitches="anchors"),
            val_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            test_dataloader=test,
            test_cfg=dict(type="mmsnnet.StitchTestLoop", **kwargs.pop("test_cfg", {})),
            test_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
        )
        runner = Runner.from_cfg(Config(config | kwargs))
        backbone = find_stitched_backbone(runner.model)
        backbone._cost_models = COSTS.setdefault(str(runner.cfg.model), {})
        randomise(runner.model)
        if initialized:
            for layer in backbone.network.layers.values():
                layer.set_base(layer.weight, layer.bias)
        return runner

    return make
