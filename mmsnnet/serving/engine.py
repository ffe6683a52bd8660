"""One replica: decodes, queues, runs batches of the stitch that the policy chooses, and answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mmsnnet.apis.images import LoadedImage
from mmsnnet.apis.prediction import Prediction
from mmsnnet.apis.predictor import Predictor
from mmsnnet.errors import UserError
from mmsnnet.serving.answers import Answer
from mmsnnet.serving.policy import Policy
from mmsnnet.serving.recent import Recent
from mmsnnet.serving.replies import describe
from mmsnnet.serving.scheduler import Batch, Request, Scheduler

T = TypeVar("T")

# Images are decoded, and answers written, beside the model.
WORKERS = 2


@dataclass
class _Work:
    """A loaded image, and where its prediction goes."""

    image: LoadedImage
    result: asyncio.Future[tuple[Prediction, Batch[_Work]]] = field(repr=False)


class Engine:
    """Answers requests with one model on one device.

    All methods run in one event loop. The model runs in a thread of its own.

    Args:
        predictor: the model.
        policy: chooses stitches and batch sizes.
        deadline_ms: the usual deadline.
        max_waiting: requests in the queue at most; more are refused.
        shape: of the model's input (C, H, W) that the policy's latencies are for.
        registry: of the metrics.
    """

    def __init__(
        self,
        predictor: Predictor,
        policy: Policy,
        deadline_ms: float,
        max_waiting: int,
        shape: tuple[int, ...],
        registry: CollectorRegistry,
    ) -> None:
        self.predictor = predictor
        self.scheduler: Scheduler[_Work] = Scheduler(policy, deadline_ms, max_waiting, shape)
        self._area = shape[-2] * shape[-1]
        self._model = ThreadPoolExecutor(1, "model")
        self._workers = ThreadPoolExecutor(WORKERS, "images")
        self._decoding = 0
        self._reply_ms = Recent(0.0)
        self._runs: asyncio.Task[None] | None = None
        self._images = Counter("mmsnnet_images", "Images that the model has answered", ["stitch"], registry=registry)
        sizes = [1, 2, 4, 8, 16, 32, 64]
        self._batch_sizes = Histogram("mmsnnet_batch_size", "Images in a batch", buckets=sizes, registry=registry)
        self._batch_seconds = Histogram("mmsnnet_batch_seconds", "Time of the model for a batch", registry=registry)
        waiting = Gauge("mmsnnet_waiting", "Requests in the queue", registry=registry)
        waiting.set_function(lambda: len(self.scheduler))
        slowness = Gauge("mmsnnet_slowness", "Measured over predicted time of recent batches", registry=registry)
        slowness.set_function(lambda: self.scheduler.speed.slowness(_now())[1])

    async def answer(self, body: bytes, left_ms: float, masks: bool = False) -> Answer:
        """Answer a request.

        Args:
            body: the content of an image file.
            left_ms: the time until the deadline.
            masks: as of :func:`mmsnnet.serving.replies.describe`.
        """
        arrival = _now()
        self.scheduler.arrived(arrival)
        # Decoding takes time of the same machine: refuse before it what will be refused after it.
        # As in the gateway, at most half of the time is reserved.
        deadline = arrival + left_ms - min(self._reply_ms.high(arrival), max(0.0, left_ms / 2))
        if not self.scheduler.accepts(arrival, deadline, beside=self._decoding):
            return self._refusal(arrival, self.scheduler.least_ms(arrival, self.scheduler.speed.base, 1.0), left_ms)
        self._decoding += 1
        try:
            image = await self._in(self._workers, lambda: self.predictor.load(body))
        except UserError as error:
            return Answer(400, dict(error=str(error)))
        finally:
            self._decoding -= 1
        # Only the shape of the shown picture is read later; its pixels may be many times those of the model's input.
        image = replace(image, image=np.broadcast_to(np.zeros((), np.uint8), image.image.shape))
        work = _Work(image, asyncio.get_running_loop().create_future())
        now = _now()
        relative_area = image.shape[-2] * image.shape[-1] / self._area
        request = self.scheduler.offer(work, now, deadline, image.shape, relative_area)
        if request is None:
            return self._refusal(now, self.scheduler.least_ms(now, image.shape, relative_area), left_ms)
        return await self._finish(request, arrival, masks)

    def state(self) -> dict[str, Any]:
        """The replica's queue, slowness and latencies, for JSON."""
        now = _now()
        return dict(
            waiting=len(self.scheduler),
            slowness=round(self.scheduler.speed.slowness(now)[1], 3),
            latencies_ms={
                name: dict(enumerate((round(ms, 3) for ms in row[1:]), 1))
                for name, row in zip(self.scheduler.policy.table.names, self.scheduler.policy.table.ms, strict=True)
            },
        )

    def stop(self) -> None:
        """End the threads."""
        if self._runs is not None:
            self._runs.cancel()
        self._model.shutdown(wait=False, cancel_futures=True)
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def _finish(self, request: Request[_Work], arrival: float, masks: bool) -> Answer:
        if self._runs is None or self._runs.done():
            self._runs = asyncio.get_running_loop().create_task(self._run())
        try:
            prediction, batch = await request.item.result
        except asyncio.CancelledError:  # the client has gone
            self.scheduler.withdraw(request)
            raise
        ended = _now()
        content = await self._in(self._workers, lambda: describe(prediction, masks))
        now = _now()
        self._reply_ms.add(now - ended, now)
        content |= dict(
            batch_size=len(batch.requests),
            times_ms=dict(
                queue=round(batch.started - arrival, 3),
                model=round(prediction.ms * len(batch.requests), 3),
                total=round(now - arrival, 3),
            ),
        )
        return Answer(200, content)

    def _refusal(self, now: float, least_ms: float, left_ms: float) -> Answer:
        wait_s = self.scheduler.drained_ms(now) / 1000
        if least_ms > left_ms:
            left = f"{left_ms:.0f} ms are left" if left_ms > 0 else "no time is left"
            error = f"the deadline is too short: {left}, and the cheapest stitch takes about {least_ms:.0f} ms now"
        else:
            error = "busy: even the cheapest stitch would miss a deadline, or the queue is full"
        return Answer(503, dict(error=error), wait_s)

    async def _run(self) -> None:
        """Run batches until the queue is empty."""
        while len(self.scheduler):
            batch = self.scheduler.next_batch(_now())
            futures = [request.item.result for request in batch.requests]
            images = [request.item.image for request in batch.requests]
            run = partial(self.predictor.predict, images, self.predictor.space[batch.stitch])
            try:
                predictions = await self._in(self._model, run)
            except Exception as error:  # each client gets it; the next batch may run
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                self.scheduler.failed()
                continue
            now = _now()
            self.scheduler.finished(batch, now)
            self._images.labels(batch.stitch).inc(len(predictions))
            self._batch_sizes.observe(len(predictions))
            self._batch_seconds.observe((now - batch.started) / 1000)
            for future, prediction in zip(futures, predictions, strict=True):
                if not future.done():  # else its client has gone
                    future.set_result((prediction, batch))

    @staticmethod
    async def _in(pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function)


def _now() -> float:
    """Milliseconds."""
    return 1000 * time.monotonic()
