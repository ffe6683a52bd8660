"""Replay a trace of arrivals against a real server on this machine, with a client that measures by its own clock."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, quantiles
from urllib.request import urlopen

import aiohttp
from serving_simulation import Outcome

REPOSITORY = Path(__file__).parents[1]
START_S = 180.0
# Sent before a trace: the first requests take longer than others.
WARM_UP = 10


@dataclass(frozen=True)
class Reply:
    """What a client saw of a request.

    Attributes:
        status: of HTTP; 0 if the connection failed.
        ms: from sending it to its last byte, by the client's clock.
        stitch: that answered, or None.
    """

    status: int
    ms: float
    stitch: str | None


@contextmanager
def server(folder: Path, policy: str, deadline_ms: float, options: Sequence[str] = ()) -> Iterator[str]:
    """Run tools/serve.py; yield its URL.

    Raises:
        RuntimeError: it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(REPOSITORY / "tools/serve.py"), str(folder), "--port", str(port)]
    command += ["--deadline-ms", str(deadline_ms), "--policy", policy, *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_S
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(f"{' '.join(command)} did not start:\n{process.communicate()[1][-2000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _is_up(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


async def play(url: str, images: Sequence[bytes], times: Sequence[float], timeout_s: float = 30.0) -> list[Reply]:
    """Send a request at each of the times, whether others were answered or not.

    Args:
        url: of the server.
        images: the content of files, sent in turns.
        times: in ms, ascending.
        timeout_s: of one request.
    """

    async def send(number: int, at: float) -> Reply:
        await asyncio.sleep(max(0.0, start + at / 1000 - time.perf_counter()))
        sent = time.perf_counter()
        stitch, status = None, 0
        try:
            async with session.post(f"{url}/predict", data=images[number % len(images)]) as reply:
                content = await reply.read()
                status = reply.status
                if status == 200:
                    stitch = json.loads(content)["stitch"]
        except (aiohttp.ClientError, asyncio.TimeoutError):
            status = 0
        return Reply(status, 1000 * (time.perf_counter() - sent), stitch)

    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(timeout_s)) as session:
        start = time.perf_counter()
        for number in range(WARM_UP):
            await send(number, 0)
        start = time.perf_counter() + 0.5
        return list(await asyncio.gather(*(send(number, at) for number, at in enumerate(times))))


def outcome(replies: Sequence[Reply], qualities: dict[str, float], deadline_ms: float) -> Outcome:
    """What became of the requests."""
    answered = [reply for reply in replies if reply.status == 200]
    in_time = sum(reply.ms <= deadline_ms for reply in answered)
    waits = [reply.ms for reply in answered]
    cuts = quantiles(waits, n=100, method="inclusive") if len(waits) > 1 else [math.nan] * 99
    return Outcome(
        requests=len(replies),
        attained=in_time / len(replies),
        quality=mean(qualities[reply.stitch] for reply in answered if reply.stitch) if answered else math.nan,
        rejected=sum(reply.status == 503 for reply in replies) / len(replies),
        late=(len(answered) - in_time) / len(replies),
        p50=cuts[49],
        p99=cuts[98],
    )


def measure(
    folder: Path,
    policy: str,
    images: Sequence[bytes],
    times: Sequence[float],
    qualities: dict[str, float],
    deadline_ms: float,
    options: Sequence[str] = (),
) -> tuple[Outcome, Counter[int]]:
    """Serve a trace with a policy; the outcome, and the number of replies by status."""
    with server(folder, policy, deadline_ms, options) as url:
        replies = asyncio.run(play(url, images, times))
    return outcome(replies, qualities, deadline_ms), Counter(reply.status for reply in replies)
