"""A published model for the page: the quickstart's, with random weights and made-up operating points."""

from dataclasses import replace
from pathlib import Path

import torch

from mmsnnet.apis import build_model, count_stitches, load_config, publish_model
from mmsnnet.evaluation import OperatingPoints
from tests.python_processes import REPOSITORY

CONFIG = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"


def publish(folder: Path, timed: bool = False) -> OperatingPoints:
    """Write ``folder/model``, a published model, and ``folder/points.json``, all its points; return these."""
    config = load_config(CONFIG)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    torch.save(dict(state_dict=model.state_dict()), folder / "iter_8.pth")
    counted = count_stitches(config, model)
    points = replace(counted, dataset="shapes", points=())
    for point in counted:
        # Quality rises with the cost, but for every third stitch.
        quality = 30 + point.flops / 1e7 - 3 * (point.id % 3)
        latency = point.flops / 1e7 if timed else None
        points = points.add(replace(point, metrics={"mIoU": quality}, latency_ms=latency))
    points.save(folder / "points.json")
    publish_model(config, folder / "iter_8.pth", folder / "model", folder / "points.json")
    return points
