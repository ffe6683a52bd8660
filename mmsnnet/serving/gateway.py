"""The HTTP side of the server: limits, the token, second attempts, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmsnnet.serving.answers import ATTEMPTS, Answer
from mmsnnet.serving.policy import LONGEST_DEADLINE_MS
from mmsnnet.serving.recent import Recent

# A client has this long to send its image.
UPLOAD_S = 10.0
# A replica has this long to answer, or this many deadlines.
ANSWER_S, ANSWER_DEADLINES = 2.0, 5
# Bodies of requests that are read or answered at the same time; above it, requests are refused.
MOST_HELD_BYTES = 2**30


class ReplicaLostError(Exception):
    """The replica ended before it answered."""


class NoReplicaError(Exception):
    """No replica can take the request now."""


class Backend(Protocol):
    """The replicas of the model, as the gateway sees them."""

    async def answer(self, body: bytes, left_ms: float, masks: bool) -> Answer:
        """As :meth:`mmsnnet.serving.engine.Engine.answer`, by any replica.

        Raises:
            ReplicaLostError, NoReplicaError: the request got no answer.
        """

    async def states(self) -> list[dict[str, Any]]:
        """The state of each replica that answers at once."""

    async def metrics(self) -> list[Sequence[Metric]]:
        """The metrics of each process of the server, of this one too."""


@dataclass(frozen=True)
class GatewaySettings:
    """Limits and fixed answers of a gateway.

    Attributes:
        deadline_ms: from the last byte of a request to its answer, if the request names no other.
        max_upload_bytes: the largest image file.
        token: that requests must carry as ``Authorization: Bearer TOKEN``; None for none.
        front: what ``/front`` returns.
        replicas: how many there are.
    """

    deadline_ms: float
    max_upload_bytes: int
    token: str | None
    front: dict[str, Any]
    replicas: int


class RefusedError(Exception):
    """A request that gets a status other than 200, and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Gateway:
    """The application that answers HTTP requests.

    Args:
        backend: the replicas.
        settings: what is allowed.
        registry: of its metrics.

    Attributes:
        app: for an ASGI server.
    """

    def __init__(self, backend: Backend, settings: GatewaySettings, registry: CollectorRegistry) -> None:
        self.backend, self.settings = backend, settings
        self._hop_ms = Recent(0.0)
        self._held_bytes = 0
        self._outcomes = Counter("mmsnnet_requests", "Requests for a prediction", ["outcome"], registry=registry)
        for outcome in ("met", "missed", "rejected", "refused", "failed"):
            self._outcomes.labels(outcome)
        self._seconds = Histogram(
            "mmsnnet_request_seconds",
            "From the last byte of a request to its answer, of answered requests",
            buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=registry,
        )
        self.app = Starlette(
            routes=[
                Route("/predict", self._predict, methods=["POST"]),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/front", self._front),
            ],
            exception_handlers={404: _not_served, 405: _not_served},
        )

    async def _predict(self, request: Request) -> Response:
        body = bytearray()
        try:
            return await self._predict_from(request, body)
        finally:
            self._held_bytes -= len(body)

    async def _predict_from(self, request: Request, body: bytearray) -> Response:
        """Read the body, whose bytes count as held, and answer."""
        try:
            self._authorize(request)
            deadline_ms, masks = _parameters(request, self.settings.deadline_ms)
            await self._read(request, body)
        except RefusedError as error:
            self._outcomes.labels("rejected" if error.status == 503 else "refused").inc()
            # The rest of the request stays unread.
            more = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
            headers = {"Connection": "close"} | more.get(error.status, {})
            return JSONResponse(dict(error=str(error)), error.status, headers)
        except ClientDisconnect:
            self._outcomes.labels("refused").inc()
            return Response(status_code=400)
        start = time.monotonic()
        try:
            answer = await self._answer(bytes(body), start, deadline_ms, masks)
        except asyncio.CancelledError:  # the client has gone
            self._outcomes.labels("refused").inc()
            raise
        total_ms = 1000 * (time.monotonic() - start)
        content, headers = dict(answer.content), {}
        if answer.status == 200:
            times = content["times_ms"]
            met = total_ms <= deadline_ms
            content |= dict(times_ms=times | dict(total=round(total_ms, 3)), deadline=dict(ms=deadline_ms, met=met))
            self._outcomes.labels("met" if met else "missed").inc()
            self._seconds.observe(total_ms / 1000)
        elif answer.status == 503:
            headers["Retry-After"] = str(max(1, math.ceil(answer.retry_after_s or 0)))
            self._outcomes.labels("rejected").inc()
        else:
            self._outcomes.labels("refused" if answer.status < 500 else "failed").inc()
        return JSONResponse(content, answer.status, headers)

    async def _read(self, request: Request, body: bytearray) -> None:
        """Append the body of a request to ``body``."""
        most = self.settings.max_upload_bytes
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise RefusedError(415, "send the file itself as the body (curl --data-binary @image.jpg), not a form")
        too_large = RefusedError(413, f"the image has more than {most} bytes")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_large

        async def read() -> None:
            async for chunk in request.stream():
                if len(body) + len(chunk) > most:
                    raise too_large
                if self._held_bytes + len(chunk) > MOST_HELD_BYTES:
                    raise RefusedError(503, "busy: too many images arrive at the same time")
                body.extend(chunk)
                self._held_bytes += len(chunk)

        try:
            await asyncio.wait_for(read(), UPLOAD_S)
        except asyncio.TimeoutError:
            raise RefusedError(408, f"the image did not arrive within {UPLOAD_S:g} s") from None
        if not body:
            raise RefusedError(400, "the body is empty: expected an image file")

    async def _answer(self, body: bytes, start: float, deadline_ms: float, masks: bool) -> Answer:
        """The answer of a replica; in time, or none."""
        most_s = max(ANSWER_S, ANSWER_DEADLINES * deadline_ms / 1000)
        try:
            return await asyncio.wait_for(self._attempts(body, start, deadline_ms, masks), most_s)
        except asyncio.TimeoutError:
            return Answer(504, dict(error=f"no answer within {most_s:g} s"))
        except NoReplicaError as error:
            return Answer(503, dict(error=str(error)), 1.0)
        except Exception:
            logging.getLogger("ray.serve").exception("a request got no answer")
            return Answer(500, dict(error="the server failed: its log says why"))

    async def _attempts(self, body: bytes, start: float, deadline_ms: float, masks: bool) -> Answer:
        """The answer of a replica. If it is lost or refuses, Ray Serve is asked once more.

        It then usually picks another: of two replicas, that with fewer requests.
        """
        refusal = None
        for _ in range(ATTEMPTS):
            now = time.monotonic()
            # At most half of the deadline: else nothing would be accepted after a stall, and nothing measured anew.
            hop_ms = min(self._hop_ms.high(1000 * now), deadline_ms / 2)
            left_ms = deadline_ms - 1000 * (now - start) - hop_ms
            if left_ms <= 0:  # no replica needs to see it
                return refusal or Answer(503, dict(error="the deadline would pass before a replica has the image"), 1.0)
            try:
                answer = await self.backend.answer(body, left_ms, masks)
            except ReplicaLostError:
                continue
            except NoReplicaError:
                if refusal is None:
                    raise
                break
            if answer.status == 503 and self.settings.replicas > 1:
                refusal = answer
                continue
            if answer.status == 200:  # the time of this attempt alone: what an earlier one took says nothing of others
                ended = time.monotonic()
                self._hop_ms.add(1000 * (ended - now) - answer.content["times_ms"]["total"], 1000 * ended)
            return answer
        if refusal is not None:
            return refusal
        raise NoReplicaError("the replicas that had the request ended before they answered")

    async def _health(self, request: Request) -> Response:
        states = await self.backend.states()
        return JSONResponse(dict(status="ok" if states else "no replica", replicas=states), 200 if states else 503)

    async def _front(self, request: Request) -> Response:
        try:
            self._authorize(request)
        except RefusedError as error:
            return JSONResponse(dict(error=str(error)), error.status, {"WWW-Authenticate": "Bearer"})
        return JSONResponse(self.settings.front)

    async def _metrics(self, request: Request) -> Response:
        return Response(exposition(await self.backend.metrics()), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def _authorize(self, request: Request) -> None:
        if self.settings.token is None:
            return
        sent = request.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
        if not hmac.compare_digest(sent, f"Bearer {self.settings.token}".encode()):
            raise RefusedError(401, "this server needs a token: send the header 'Authorization: Bearer TOKEN'")


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked, there = f"{request.method} {quote(request.url.path)}", "POST /predict, GET /health, /front and /metrics"
    return JSONResponse(dict(error=f"there is no {asked}: there are {there}"), error.status_code, error.headers)


def _parameters(request: Request, deadline_ms: float) -> tuple[float, bool]:
    """The deadline in ms, and whether masks are wanted, from the query."""
    parameters = dict(request.query_params)
    if len(parameters) < len(request.query_params.multi_items()):
        raise RefusedError(400, "a parameter stands twice in the query")
    text, masks = parameters.pop("deadline_ms", str(deadline_ms)), parameters.pop("masks", "false").lower()
    if parameters:
        raise RefusedError(400, f"unknown parameter {next(iter(parameters))!r}: there are deadline_ms and masks")
    if masks not in ("true", "false"):
        raise RefusedError(400, f"masks is true or false, got {masks!r}")
    try:
        deadline_ms = float(text)
    except ValueError:
        deadline_ms = math.nan
    if not 0 < deadline_ms <= LONGEST_DEADLINE_MS:
        raise RefusedError(400, f"deadline_ms is a number of ms up to {LONGEST_DEADLINE_MS}, got {text!r}")
    return deadline_ms, masks == "true"


class _Families:
    """Metrics of several processes, as a collector."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


def labelled(registry: CollectorRegistry, process: str) -> list[Metric]:
    """The metrics of a process, with its name as the label ``process`` of each sample."""
    families = []
    for family in registry.collect():
        copied = Metric(family.name, family.documentation, family.type)
        for sample in family.samples:
            if sample.name.endswith("_created"):  # OpenMetrics' own; Prometheus would store it as one more series
                continue
            copied.add_sample(sample.name, {**sample.labels, "process": process}, sample.value)
        families.append(copied)
    return families


def exposition(processes: Sequence[Sequence[Metric]]) -> bytes:
    """The metrics of all processes as Prometheus reads them: each family once, with the samples of all."""
    merged: dict[str, Metric] = {}
    for family in (family for metrics in processes for family in metrics):
        known = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        known.samples.extend(family.samples)
    registry = CollectorRegistry()
    registry.register(_Families(list(merged.values())))
    return generate_latest(registry)
