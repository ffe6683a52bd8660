"""A replica answers as Predictor does, in batches; no request harms another."""

import asyncio
import base64
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import cv2
import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from mmsnnet.apis import Prediction, Predictor
from mmsnnet.apis.images import LoadedImage
from mmsnnet.errors import UserError
from mmsnnet.serving.answers import Answer
from mmsnnet.serving.engine import Engine
from mmsnnet.serving.policy import FixedStitch, LatencyTable, LookAhead, Policy
from mmsnnet.serving.replies import describe
from mmsnnet.stitching import Stitch
from tests.demo.published_model import publish
from tests.serving.pictures import content, huge_png, photo

T = TypeVar("T")
LONG_MS = 60_000.0
# Far below what the model takes, so that deadlines of LONG_MS decide nothing.
TABLE = LatencyTable({name: {1: low, 4: low + 0.1} for name, low in (("S", 0.1), ("L3-S2", 0.2), ("L9-S5", 0.3))})


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("published")
    publish(folder)
    return Predictor(folder / "model", device="cpu", max_pixels=100_000)


class GatedPredictor:
    """A predictor whose model waits at a gate before each batch.

    Attributes:
        open: lets batches run.
        entered: a batch is at the gate.
        batches: the number of images and the stitch of each batch that came to the gate.
        failing: the batches, by their number, that fail.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.open, self.entered = threading.Event(), threading.Event()
        self.batches: list[tuple[int, str]] = []
        self.failing: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def predict(self, images: Sequence[LoadedImage], stitch: Stitch) -> list[Prediction]:
        number = len(self.batches)
        self.batches.append((len(images), stitch.name))
        self.entered.set()
        assert self.open.wait(60)
        if number in self.failing:
            raise RuntimeError(f"batch {number} failed")
        return self._predictor.predict(images, stitch)


@pytest.fixture
def gated(predictor: Predictor) -> Iterator[GatedPredictor]:
    gated = GatedPredictor(predictor)
    yield gated
    gated.open.set()


@contextmanager
def running(predictor: Any, policy: Policy | None = None, max_waiting: int = 128) -> Iterator[Engine]:
    policy = LookAhead(TABLE) if policy is None else policy
    engine = Engine(predictor, policy, LONG_MS, max_waiting, (3, 64, 64), CollectorRegistry())
    try:
        yield engine
    finally:
        engine.stop()


def run(job: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(asyncio.wait_for(job(), 60))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def mask_of(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.content
    png = np.frombuffer(base64.b64decode(answer.content["mask_png"]), np.uint8)
    return cv2.imdecode(png, cv2.IMREAD_UNCHANGED)


def segments_of(prediction: Prediction) -> np.ndarray:
    return prediction.data_sample.pred_sem_seg.data[0].numpy()


async def ask(engine: Engine, body: bytes, left_ms: float = LONG_MS) -> Answer:
    return await engine.answer(body, left_ms, masks=True)


@pytest.mark.parametrize("stitch", range(3))
@pytest.mark.parametrize("suffix", ["png", "jpeg"])
def test_an_answer_is_what_predictor_predicts(predictor: Predictor, suffix: str, stitch: int) -> None:
    body, before = content(photo(), suffix), predictor.stitch
    with running(predictor, FixedStitch(TABLE, stitch)) as engine:
        answer = run(lambda: ask(engine, body))
    expected = describe(predictor(body, stitch=TABLE.names[stitch]), masks=True)
    assert answer.status == 200 and {name: answer.content[name] for name in expected} == expected
    assert answer.content["stitch"] == TABLE.names[stitch] and predictor.stitch == before
    times = answer.content["times_ms"]
    assert 0 < times["model"] < times["total"] and 0 < times["queue"] < times["total"]
    assert answer.content["batch_size"] == 1


IMAGES = {
    "rotated by EXIF": lambda exif: content(photo(size=(64, 48)), "jpeg", exif=exif),
    "grayscale": lambda exif: content(photo().convert("L")),
    "palette": lambda exif: content(photo().convert("P")),
    "RGBA": lambda exif: content(photo().convert("RGBA")),
    "CMYK": lambda exif: content(photo().convert("CMYK"), "jpeg"),
    "16 bits": lambda exif: content(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))),
    "one pixel": lambda exif: content(photo(size=(1, 1))),
    "a line": lambda exif: content(photo(size=(500, 1))),
    "cut short": lambda exif: content(photo())[:-100],
    "too large": lambda exif: content(photo(size=(400, 300))),
    "huge": lambda exif: huge_png(),
    "text": lambda exif: b"rubbish",
    "zeros": lambda exif: bytes(1000),
}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_read_as_predictor_reads_it(predictor: Predictor, image: str) -> None:
    """Or refused for the same reason."""
    exif = Image.Exif()
    exif[0x0112] = 6
    body = IMAGES[image](exif)
    with running(predictor, FixedStitch(TABLE, 0)) as engine:
        answer = run(lambda: ask(engine, body))
    try:
        expected = predictor(body, stitch="S")
    except UserError as error:
        assert answer == Answer(400, dict(error=str(error))) and "\n" not in str(error)
    else:
        assert np.array_equal(mask_of(answer), segments_of(expected))
        assert answer.content["image_size"] == list(expected.image.shape[:2])
    assert (answer.status == 400) == (image in ("cut short", "too large", "huge", "text", "zeros", "16 bits"))


def test_requests_that_come_together_share_batches(predictor: Predictor, gated: GatedPredictor) -> None:
    bodies = [content(photo(seed)) for seed in range(6)]

    async def together() -> list[Answer]:
        first = asyncio.create_task(ask(engine, bodies[0]))
        await until(gated.entered.is_set)
        others = [asyncio.create_task(ask(engine, body)) for body in bodies[1:]]
        await until(lambda: len(engine.scheduler) == 5)
        assert engine.state()["waiting"] == 5
        gated.open.set()
        return [await task for task in (first, *others)]

    with running(gated, FixedStitch(TABLE, 0)) as engine:
        answers = run(together)
    assert gated.batches == [(1, "S"), (4, "S"), (1, "S")]
    assert [answer.content["batch_size"] for answer in answers] == [1, 4, 4, 4, 4, 1]
    for body, answer in zip(bodies, answers, strict=True):  # each has its own
        expected = segments_of(predictor(body, stitch="S"))
        assert (mask_of(answer) == expected).mean() > 0.99  # larger batches round differently
    assert len({str(answer.content["classes"]) for answer in answers}) > 1


def test_images_of_other_sizes_share_no_batch(predictor: Predictor, gated: GatedPredictor) -> None:
    bodies = [content(photo(seed, (64 + 32 * (seed % 2), 64))) for seed in range(8)]

    async def together() -> list[Answer]:
        tasks = [asyncio.create_task(ask(engine, body)) for body in bodies]
        await until(lambda: len(engine.scheduler) + sum(size for size, _ in gated.batches) == 8)
        gated.open.set()
        return list(await asyncio.gather(*tasks))

    with running(gated, FixedStitch(TABLE, 0)) as engine:
        answers = run(together)
    assert sum(size for size, _ in gated.batches) == 8 and len(gated.batches) < 8
    for body, answer in zip(bodies, answers, strict=True):
        expected = predictor(body, stitch="S")
        assert answer.content["image_size"] == list(expected.image.shape[:2])
        assert (mask_of(answer) == segments_of(expected)).mean() > 0.99


def test_an_unreadable_image_harms_no_other(gated: GatedPredictor) -> None:
    async def together() -> list[Answer]:
        first = asyncio.create_task(ask(engine, content(photo())))
        await until(gated.entered.is_set)
        bodies = [b"rubbish", content(photo(1)), b"", content(photo(2)), content(photo())[:200]]
        tasks = [asyncio.create_task(ask(engine, body)) for body in bodies]
        await until(lambda: sum(task.done() for task in tasks) == 3)  # before the model is free
        gated.open.set()
        return [await first, *await asyncio.gather(*tasks)]

    with running(gated) as engine:
        answers = run(together)
    assert [answer.status for answer in answers] == [200, 400, 200, 400, 200, 400]
    assert [size for size, _ in gated.batches] == [1, 2]


def test_a_batch_that_fails_is_the_only_one(gated: GatedPredictor) -> None:
    gated.failing = {1}

    async def together() -> list[Any]:
        first = asyncio.create_task(ask(engine, content(photo())))
        await until(gated.entered.is_set)
        others = [asyncio.create_task(ask(engine, content(photo(seed)))) for seed in range(5)]
        await until(lambda: len(engine.scheduler) == 5)
        gated.open.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        return [*results, await ask(engine, content(photo()))]

    with running(gated, FixedStitch(TABLE, 0)) as engine:
        first, *others, last = run(together)
    assert [size for size, _ in gated.batches] == [1, 4, 1, 1]
    assert [str(error) for error in others[:4]] == ["batch 1 failed"] * 4
    assert first.status == others[4].status == last.status == 200


def test_an_answer_that_cannot_be_written_is_an_error_of_its_own(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_once(prediction: Prediction, masks: bool) -> dict[str, Any]:
        monkeypatch.undo()
        raise ArithmeticError("NaN")

    async def twice() -> Answer:
        with pytest.raises(ArithmeticError):
            await ask(engine, content(photo()))
        return await ask(engine, content(photo()))

    monkeypatch.setattr("mmsnnet.serving.engine.describe", fails_once)
    with running(predictor) as engine:
        assert run(twice).status == 200


def test_a_cancelled_request_leaves_the_queue(gated: GatedPredictor) -> None:
    async def together() -> list[Any]:
        first = asyncio.create_task(ask(engine, content(photo())))
        await until(gated.entered.is_set)
        others = [asyncio.create_task(ask(engine, content(photo(seed)))) for seed in range(3)]
        await until(lambda: len(engine.scheduler) == 3)
        for task in (first, others[1]):  # one runs, the other waits
            task.cancel()
        await until(lambda: len(engine.scheduler) == 2)
        gated.open.set()
        return list(await asyncio.gather(first, *others, return_exceptions=True))

    with running(gated) as engine:
        first, left, gone, right = run(together)
    assert isinstance(first, asyncio.CancelledError) and isinstance(gone, asyncio.CancelledError)
    assert left.status == right.status == 200 and [size for size, _ in gated.batches] == [1, 2]


def test_a_full_queue_refuses(gated: GatedPredictor) -> None:
    async def together() -> tuple[list[Answer], list[Answer]]:
        first = asyncio.create_task(ask(engine, content(photo())))
        await until(gated.entered.is_set)
        waiting = [asyncio.create_task(ask(engine, content(photo(seed)))) for seed in range(2)]
        await until(lambda: len(engine.scheduler) == 2)
        # The last ones come while the queue seems to have room, because an image is decoded before it waits.
        refused = [await ask(engine, content(photo())) for _ in range(3)]
        gated.open.set()
        return [await task for task in (first, *waiting)], refused

    with running(gated, max_waiting=2) as engine:
        accepted, refused = run(together)
    assert [answer.status for answer in accepted] == [200] * 3
    for answer in refused:
        assert answer.status == 503 and "the queue is full" in answer.content["error"]
        assert answer.retry_after_s is not None and 0 <= answer.retry_after_s < 60


def test_no_more_requests_wait_than_allowed(gated: GatedPredictor) -> None:
    """Not even while images are decoded."""

    async def together() -> list[int]:
        tasks = [asyncio.create_task(ask(engine, content(photo(seed)))) for seed in range(20)]
        await until(lambda: sum(task.done() for task in tasks) >= 16)
        assert len(engine.scheduler) <= 3
        gated.open.set()
        return [answer.status for answer in await asyncio.gather(*tasks)]

    with running(gated, max_waiting=3) as engine:
        statuses = run(together)
    assert sorted(set(statuses)) == [200, 503] and 3 <= statuses.count(200) <= 4


def test_a_deadline_that_no_stitch_meets_is_refused(predictor: Predictor) -> None:
    with running(predictor, LookAhead(LatencyTable({"S": {1: 50_000.0}, "L9-S5": {1: 90_000.0}}))) as engine:
        early = run(lambda: ask(engine, content(photo()), left_ms=40_000))
        late = run(lambda: ask(engine, b"rubbish", left_ms=-1))  # before it is decoded
    for answer, left in ((early, "40000 ms are left"), (late, "no time is left")):
        error = f"the deadline is too short: {left}, and the cheapest stitch takes about 50000 ms now"
        assert answer == Answer(503, dict(error=error), 0.0)


def test_metrics_count_images_by_stitch(predictor: Predictor) -> None:
    registry = CollectorRegistry()
    engine = Engine(predictor, FixedStitch(TABLE, 1), LONG_MS, 8, (3, 64, 64), registry)  # type: ignore[arg-type]
    answered: list[Awaitable[Answer]] = []

    async def several() -> None:
        answered.extend(await asyncio.gather(*(ask(engine, content(photo(seed))) for seed in range(3))))
        await ask(engine, b"rubbish")

    run(several)
    engine.stop()
    assert registry.get_sample_value("mmsnnet_images_total", dict(stitch="L3-S2")) == 3
    assert registry.get_sample_value("mmsnnet_batch_size_sum") == 3
    assert registry.get_sample_value("mmsnnet_waiting") == 0
    assert registry.get_sample_value("mmsnnet_slowness") > 0
