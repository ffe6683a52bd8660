"""A replica of the model: one process of Ray Serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from ray import serve

from mmsnnet.apis.predictor import Predictor
from mmsnnet.serving.answers import Answer
from mmsnnet.serving.calibration import blank_image, calibrate, servable
from mmsnnet.serving.engine import Engine
from mmsnnet.serving.gateway import labelled
from mmsnnet.serving.policy import POLICIES, FixedStitch, Policy


@dataclass(frozen=True)
class ReplicaSettings:
    """Settings of a replica: its model and its limits.

    Attributes:
        folder: of the model, on each machine.
        points: a file of operating points; None for the folder's.
        device: as of :class:`mmsnnet.apis.Predictor`.
        threads: of torch on a CPU.
        metric: compares stitches; None for the task's own.
        policy: a key of ``POLICIES``, or the name of a stitch, which then always runs.
        deadline_ms, max_waiting: as of :class:`mmsnnet.serving.engine.Engine`.
        max_pixels: of an image.
    """

    folder: Path
    points: Path | None
    device: str
    threads: int | None
    metric: str | None
    policy: str
    deadline_ms: float
    max_waiting: int
    max_pixels: int


class Replica:
    """A model on one device, for Ray Serve."""

    def __init__(self, settings: ReplicaSettings) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        predictor = Predictor(
            settings.folder, device=settings.device, points=settings.points, max_pixels=settings.max_pixels
        )
        points = predictor.points
        assert points is not None  # tools/serve.py has checked it
        names = [point.name for point in servable(points, settings.metric)]
        if settings.policy not in POLICIES:
            names = [settings.policy]
        table = calibrate(predictor, points, names, settings.deadline_ms, torch.get_num_threads())
        policy: Policy = POLICIES[settings.policy](table) if settings.policy in POLICIES else FixedStitch(table, 0)
        shape = blank_image(predictor, points.input_shape).shape
        self.registry = CollectorRegistry()
        self.engine = Engine(
            predictor,
            policy,
            settings.deadline_ms,
            settings.max_waiting,
            shape,
            self.registry,
        )
        self.name = f"replica-{serve.get_replica_context().replica_id.unique_id}"

    async def answer(self, body: bytes, left_ms: float, masks: bool) -> Answer:
        return await self.engine.answer(body, left_ms, masks)

    async def state(self) -> dict[str, Any]:
        return self.engine.state() | dict(name=self.name)

    async def metrics(self) -> list[Metric]:
        return labelled(self.registry, self.name)
