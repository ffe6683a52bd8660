"""Each request gets an answer with a clear status, whatever clients send and replicas do, and is counted once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from mmsnnet.serving import gateway
from mmsnnet.serving.answers import Answer
from mmsnnet.serving.gateway import Gateway, GatewaySettings, NoReplicaError, ReplicaLostError, labelled

IMAGE = b"the content of an image"
PREDICTION = Answer(200, dict(stitch="L", times_ms=dict(queue=0.0, model=1.0, total=1.0)))
FRONT = dict(stitches=["S", "L"])
Reaction = Answer | Exception | Callable[[], Awaitable[Answer]]


@dataclass
class FakeReplicas:
    """Replicas that answer as they are told; the last reaction repeats.

    Attributes:
        reactions: to requests, in order.
        requests: what they were asked: body, time left, masks.
        running: their states.
        registries: the metrics of each process, by name.
    """

    reactions: list[Reaction] = field(default_factory=lambda: [PREDICTION])
    requests: list[tuple[bytes, float, bool]] = field(default_factory=list)
    running: list[dict[str, Any]] = field(default_factory=lambda: [dict(name="a"), dict(name="b")])
    registries: dict[str, CollectorRegistry] = field(default_factory=dict)

    async def answer(self, body: bytes, left_ms: float, masks: bool) -> Answer:
        self.requests.append((body, left_ms, masks))
        reaction = self.reactions[0] if len(self.reactions) == 1 else self.reactions.pop(0)
        if isinstance(reaction, Exception):
            raise reaction
        return reaction if isinstance(reaction, Answer) else await reaction()

    async def states(self) -> list[dict[str, Any]]:
        return self.running

    async def metrics(self) -> list[Sequence[Metric]]:
        return [labelled(registry, name) for name, registry in self.registries.items()]


class Clock:
    """The gateway's: time stands still until a test moves it, in seconds."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gateway, "time", clock)
    return clock


def after(clock: Clock, reaction: Answer | Exception) -> Callable[[], Awaitable[Answer]]:
    """A reaction that takes 250 ms."""

    async def react() -> Answer:
        clock.now += 0.25
        if isinstance(reaction, Exception):
            raise reaction
        return reaction

    return react


class Server:
    """A gateway in this process, before fake replicas.

    Args:
        reactions: of the replicas.
        token: of the gateway.
        number: of replicas.
    """

    def __init__(self, *reactions: Reaction, token: str | None = None, number: int = 2) -> None:
        self.replicas = FakeReplicas(list(reactions) or [PREDICTION])
        registry = CollectorRegistry()
        self.replicas.registries["gateway"] = registry
        settings = GatewaySettings(10_000, max_upload_bytes=1000, token=token, front=FRONT, replicas=number)
        self.app = Gateway(self.replicas, settings, registry).app

    async def ask(self, path: str, method: str = "POST", **request: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    def post(self, path: str = "/predict", content: Any = IMAGE, **request: Any) -> httpx.Response:
        return asyncio.run(self.ask(path, content=content, **request))

    def get(self, path: str, **request: Any) -> httpx.Response:
        return asyncio.run(self.ask(path, "GET", **request))

    def outcomes(self) -> dict[str, float]:
        """The requests by outcome, without those that have none."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = next(family.samples for family in families if family.name == "mmsnnet_requests")
        return {sample.labels["outcome"]: sample.value for sample in samples if sample.value}


async def hang() -> Answer:
    await asyncio.sleep(60)
    raise AssertionError


def refusal(response: httpx.Response, status: int) -> str:
    """The one line of a refusal, which only JSON has."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"} and "\n" not in error and "Traceback" not in error
    return error


def test_an_answer_says_whether_it_met_the_deadline(clock: Clock) -> None:
    server = Server(after(clock, PREDICTION))
    answer = server.post("/predict?deadline_ms=5000&masks=true")
    assert answer.status_code == 200 and answer.json()["stitch"] == "L"
    assert answer.json()["deadline"] == dict(ms=5000, met=True)
    assert answer.json()["times_ms"] == dict(queue=0, model=1, total=250)
    assert server.replicas.requests == [(IMAGE, 5000, True)]
    late = server.post("/predict?deadline_ms=249")
    assert late.status_code == 200 and late.json()["deadline"] == dict(ms=249, met=False)
    assert server.outcomes() == dict(met=1, missed=1)


def test_the_deadline_of_the_server_holds_without_another() -> None:
    server = Server()
    assert server.post().json()["deadline"]["ms"] == 10_000
    assert server.replicas.requests == [(IMAGE, 10_000, False)]


@pytest.mark.parametrize("deadline", ["nan", "inf", "-inf", "-1", "0", "1e9", "600001", "soon", ""])
def test_a_deadline_is_a_positive_number_of_ms(deadline: str) -> None:
    server = Server()
    error = refusal(server.post("/predict", params=dict(deadline_ms=deadline)), 400)
    assert error == f"deadline_ms is a number of ms up to 600000, got {deadline!r}"
    assert server.replicas.requests == [] and server.outcomes() == dict(refused=1)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("deadline=5", "unknown parameter 'deadline': there are deadline_ms and masks"),
        ("masks=yes", "masks is true or false, got 'yes'"),
        ("masks=", "masks is true or false, got ''"),
        ("%00=1", r"unknown parameter '\x00'"),
        ("deadline_ms=5&deadline_ms=6", "a parameter stands twice in the query"),
    ],
)
def test_an_unknown_parameter_is_refused(query: str, message: str) -> None:
    assert message in refusal(Server().post(f"/predict?{query}"), 400)


def test_an_empty_body_is_refused() -> None:
    assert refusal(Server().post(content=b""), 400) == "the body is empty: expected an image file"


@pytest.mark.parametrize("token", ["secret", "Geheimnis ß"])
def test_a_token_is_needed_where_one_is_set(token: str) -> None:
    server = Server(token=token)
    right = {"Authorization": f"Bearer {token}".encode()}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": token.encode()}, {"Authorization": ""}):
        for answer in (server.post(headers=headers), server.get("/front", headers=headers)):
            assert "Authorization: Bearer TOKEN" in refusal(answer, 401)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert server.replicas.requests == [] and server.outcomes() == dict(refused=4)
    assert server.post(headers=right).status_code == server.get("/front", headers=right).status_code == 200
    # Monitoring does without.
    assert server.get("/health").status_code == server.get("/metrics").status_code == 200


def test_a_slow_body_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield IMAGE
        await asyncio.sleep(60)

    monkeypatch.setattr(gateway, "UPLOAD_S", 0.1)
    server = Server()
    assert refusal(server.post(content=slow()), 408) == "the image did not arrive within 0.1 s"
    assert server.replicas.requests == [] and server.outcomes() == dict(refused=1)


def test_a_large_body_is_refused_with_and_without_its_length() -> None:
    read = []

    async def chunks() -> AsyncIterator[bytes]:
        for number in range(100):
            read.append(number)
            yield 300 * b"x"

    server = Server()
    assert server.post(content=1000 * b"x").status_code == 200
    assert refusal(server.post(content=1001 * b"x"), 413) == "the image has more than 1000 bytes"
    refusal(server.post(content=chunks()), 413)
    assert len(read) <= 5  # not all of it
    # The length alone decides, before any byte is read.
    refusal(server.post(content=b"x", headers={"Content-Length": str(10**30)}), 413)
    assert len(server.replicas.requests) == 1 and server.outcomes() == dict(met=1, refused=3)


def test_a_form_is_refused() -> None:
    answer = asyncio.run(Server().ask("/predict", files=dict(image=IMAGE)))
    assert "--data-binary" in refusal(answer, 415)


def test_other_methods_and_paths_are_refused() -> None:
    server = Server()
    there = "there are POST /predict, GET /health, /front and /metrics"
    assert refusal(server.get("/predict"), 405) == f"there is no GET /predict: {there}"
    assert refusal(server.post("/health"), 405) == f"there is no POST /health: {there}"
    assert server.get("/predict").headers["allow"] == "POST"
    for path in ("/", "/predict/../../etc/passwd", "/a%0Ab"):
        assert refusal(server.get(path), 404).endswith(there)


@pytest.mark.parametrize(("wait_s", "header"), [(None, "1"), (0.0, "1"), (0.2, "1"), (2.1, "3")])
def test_an_overloaded_server_says_when_to_come_back(wait_s: float | None, header: str) -> None:
    server = Server(Answer(503, dict(error="busy"), wait_s))
    answer = server.post()
    assert refusal(answer, 503) == "busy" and answer.headers["Retry-After"] == header
    assert server.outcomes() == dict(rejected=1)


def test_an_answer_of_the_replica_is_passed_on() -> None:
    server = Server(Answer(400, dict(error="no image")), Answer(500, dict(error="the model failed")))
    assert refusal(server.post(), 400) == "no image" and refusal(server.post(), 500) == "the model failed"
    assert server.outcomes() == dict(refused=1, failed=1)


def test_a_replica_that_hangs_ends_in_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "ANSWER_S", 0.1)
    server = Server(hang)
    assert refusal(server.post("/predict?deadline_ms=10"), 504) == "no answer within 0.1 s"
    assert refusal(server.post("/predict?deadline_ms=40"), 504) == "no answer within 0.2 s"
    assert server.outcomes() == dict(failed=2)


def test_another_replica_answers_for_a_lost_one(clock: Clock) -> None:
    """What the lost one took is not reserved for the next requests."""
    server = Server(after(clock, ReplicaLostError()), after(clock, PREDICTION))
    assert [server.post().status_code for _ in range(2)] == [200, 200]
    assert server.replicas.requests == [(IMAGE, left_ms, False) for left_ms in (10_000, 9_750, 10_000 - 249)]
    assert server.outcomes() == dict(met=2)


BUSY = Answer(503, dict(error="busy"), 2.5)


@pytest.mark.parametrize("other", [PREDICTION, Answer(400, dict(error="no image"))])
def test_another_replica_answers_for_a_busy_one(other: Answer, clock: Clock) -> None:
    """What the busy one took is not reserved for the next requests, and the request counts once."""
    server = Server(after(clock, BUSY), after(clock, other))
    assert [server.post().status_code for _ in range(2)] == [other.status] * 2
    hop_ms = 249 if other == PREDICTION else 0
    assert server.replicas.requests == [(IMAGE, left_ms, False) for left_ms in (10_000, 9_750, 10_000 - hop_ms)]
    assert server.outcomes() == ({"met": 2} if other == PREDICTION else {"refused": 2})


@pytest.mark.parametrize("other", [BUSY, ReplicaLostError(), NoReplicaError("no replica runs")])
def test_without_a_free_replica_the_client_hears_when_to_come_back(other: Answer | Exception) -> None:
    server = Server(BUSY, other)
    answer = server.post()
    assert refusal(answer, 503) == "busy" and answer.headers["Retry-After"] == "3"
    assert len(server.replicas.requests) == 2 and server.outcomes() == dict(rejected=1)


def test_the_refusal_of_the_only_replica_is_final() -> None:
    server = Server(BUSY, number=1)
    assert server.post().status_code == 503 and len(server.replicas.requests) == 1


def test_a_busy_replica_that_has_used_the_time_up_has_the_last_word(clock: Clock) -> None:
    server = Server(after(clock, BUSY))
    assert refusal(server.post("/predict?deadline_ms=250"), 503) == "busy" and len(server.replicas.requests) == 1


@pytest.mark.parametrize(("error", "attempts"), [(ReplicaLostError(), 2), (NoReplicaError("no replica runs"), 1)])
def test_without_a_replica_the_client_comes_back(error: Exception, attempts: int) -> None:
    server = Server(error)
    answer = server.post()
    assert "replica" in refusal(answer, 503) and answer.headers["Retry-After"] == "1"
    assert len(server.replicas.requests) == attempts and server.outcomes() == dict(rejected=1)


def test_a_stall_reserves_no_more_than_half_of_a_deadline(clock: Clock) -> None:
    """Else no request would be accepted after it, and no shorter time measured."""
    server = Server(after(clock, PREDICTION))
    for deadline_ms in (100, 100, 1000):
        server.post(f"/predict?deadline_ms={deadline_ms}")
    assert [left_ms for _, left_ms, _ in server.replicas.requests] == [100, 50, 1000 - 249]


def test_bodies_that_are_held_at_the_same_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MOST_HELD_BYTES", len(IMAGE) - 1)
    server = Server(PREDICTION)
    answer = server.post()
    assert "busy" in refusal(answer, 503) and answer.headers["Retry-After"] == "1"
    monkeypatch.setattr(gateway, "MOST_HELD_BYTES", len(IMAGE))
    assert [server.post().status_code for _ in range(3)] == [200] * 3  # answered bodies do not count
    assert server.outcomes() == dict(rejected=1, met=3)


def test_any_other_error_is_an_answer_too() -> None:
    server = Server(ZeroDivisionError("with a secret"))
    assert refusal(server.post(), 500) == "the server failed: its log says why"
    assert server.outcomes() == dict(failed=1)


def test_a_client_that_goes_is_counted() -> None:
    async def go() -> None:
        request = asyncio.create_task(server.ask("/predict", content=IMAGE))
        while not server.replicas.requests:
            await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    server = Server(hang)
    asyncio.run(go())
    assert server.outcomes() == dict(refused=1)


def test_requests_wait_side_by_side() -> None:
    """A slow one delays no other."""

    async def slow() -> Answer:
        await released.wait()
        return PREDICTION

    async def together() -> list[int]:
        first = asyncio.create_task(server.ask("/predict", content=IMAGE, params=dict(deadline_ms=60_000)))
        while not server.replicas.requests:
            await asyncio.sleep(0)
        others = await asyncio.gather(*(server.ask("/predict", content=IMAGE) for _ in range(20)))
        assert not first.done()
        released.set()
        return [answer.status_code for answer in (*others, await first)]

    released = asyncio.Event()
    server = Server(slow, PREDICTION)
    assert asyncio.run(together()) == [200] * 21


def test_health_is_that_of_the_replicas() -> None:
    server = Server()
    assert server.get("/health").json() == dict(status="ok", replicas=[dict(name="a"), dict(name="b")])
    server.replicas.running = []
    assert server.get("/health").status_code == 503
    assert server.get("/health").json() == dict(status="no replica", replicas=[])


def test_the_front_is_the_one_that_was_set() -> None:
    assert Server().get("/front").json() == FRONT


def test_metrics_of_all_processes_are_one_page(clock: Clock) -> None:
    server = Server(after(clock, PREDICTION), BUSY, BUSY, hang, ReplicaLostError())
    for name, images in (("replica-a", 2), ("replica-b", 3)):
        server.replicas.registries[name] = registry = CollectorRegistry()
        PrometheusCounter("mmsnnet_images", "Images", ["stitch"], registry=registry).labels('a "b"\n').inc(images)
    statuses = [server.post().status_code for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway, "ANSWER_S", 0.1)
        statuses += [server.post("/predict?deadline_ms=1").status_code for _ in range(2)]
    statuses.append(server.post("/predict?unknown").status_code)
    assert statuses == [200, 503, 504, 503, 400]
    page = server.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(page.text))
    assert max(Counter(family.name for family in families).values()) == 1
    samples = {family.name: family.samples for family in families}
    assert sum(sample.value for sample in samples["mmsnnet_requests"]) == len(statuses)
    assert {sample.labels["outcome"] for sample in samples["mmsnnet_requests"]} == {
        *("met", "missed", "rejected", "refused", "failed")
    }
    assert {sample.labels["process"]: sample.value for sample in samples["mmsnnet_images"]} == {
        "replica-a": 2,
        "replica-b": 3,
    }
    assert {sample.labels["stitch"] for sample in samples["mmsnnet_images"]} == {'a "b"\n'}
    seconds = {sample.name: sample.value for sample in samples["mmsnnet_request_seconds"] if "le" not in sample.labels}
    assert seconds["mmsnnet_request_seconds_count"] == 1 and seconds["mmsnnet_request_seconds_sum"] == 0.25
