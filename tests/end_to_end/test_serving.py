"""The server, as users start it: it answers through bad clients, a killed replica and its own end."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mmsnnet.apis import OperatingPoints, Predictor
from mmsnnet.serving.replies import describe
from tests.demo.published_model import publish
from tests.ports import free_port
from tests.python_processes import REPOSITORY
from tests.serving.pictures import content, huge_png, photo

# Far above what any request takes here, so that no time decides a test.
DEADLINE_MS = 60_000
START_S, ANSWER_S, RECOVERY_S, END_S = 300, 60, 120, 60
IMAGE = content(photo())
REPLICA = "ray::ServeReplica:mmsnnet:Replica"


class Server:
    """``tools/serve.py`` in a process group of its own, as a shell starts it.

    Args:
        folder: of the model.
        logs: an empty folder, for what the server prints.
        arguments: further ones.
    """

    def __init__(self, folder: Path, logs: Path, *arguments: object) -> None:
        self.port = free_port()
        self._stdout, self._stderr = logs / "stdout.txt", logs / "stderr.txt"
        command = [sys.executable, REPOSITORY / "tools/serve.py", folder, "--port", self.port, *arguments]
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=logs, stdout=stdout, stderr=stderr, start_new_session=True
            )
        self.started: list[psutil.Process] = []

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait_for_start(self) -> None:
        end = time.monotonic() + START_S
        while "http://" not in self.stdout:
            assert self.process.poll() is None and time.monotonic() < end, self.stdout + self.stderr
            time.sleep(0.1)

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The processes that the server has started, whose title has ``name``."""
        running = psutil.Process(self.process.pid).children(recursive=True)
        self.started = list({*self.started, *running})
        found = []
        for process in running:
            with suppress(psutil.NoSuchProcess):  # Ray's idle workers end at any time
                if name in "".join(process.cmdline()[:1]):
                    found.append(process)
        return found

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def post(self, body: bytes = IMAGE, path: str = "/predict", **request: Any) -> httpx.Response:
        return httpx.post(self.url(path), content=body, timeout=ANSWER_S, **request)

    def replicas(self) -> list[str]:
        """The names of the replicas that answer at once."""
        return [state["name"] for state in httpx.get(self.url("/health"), timeout=ANSWER_S).json()["replicas"]]

    def signal(self, number: int) -> None:
        """Send a signal as Ctrl-C sends it, to the group, or as ``kill`` sends it, to the process."""
        self.processes()
        (os.killpg if number == signal.SIGINT else os.kill)(self.process.pid, number)

    def check_end(self) -> None:
        """The server ends with status 0, without a word on stderr, and no process of it is left."""
        assert self.process.wait(END_S) == 0 and self.stderr == ""
        _, left = psutil.wait_procs(self.started, timeout=END_S)
        assert left == []

    def kill(self) -> None:
        """End whatever is left."""
        if self.process.poll() is None:
            self.processes()
            self.process.kill()
        for process in self.started:
            if process.is_running():
                process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a front of three stitches, which each replica times."""
    folder = tmp_path_factory.mktemp("published")
    publish(folder)
    front = OperatingPoints.load(folder / "model/front.json")
    cheapest, *others, best = sorted(front, key=lambda point: point.flops)
    replace(front, points=(cheapest, others[len(others) // 2], best)).save(folder / "model/front.json")
    return folder / "model"


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ("--deadline-ms", DEADLINE_MS, "--replicas", 2, "--threads", 1, "--max-upload-mb", 0.1)
    server = Server(folder, tmp_path_factory.mktemp("server"), *arguments)
    try:
        server.wait_for_start()
        yield server
    finally:
        server.kill()


async def post_together(
    server: Server, number: int, meanwhile: Callable[[], object] | None = None
) -> list[httpx.Response]:
    """Send requests at once, each on a connection of its own; do something after the first answers."""
    images = [content(photo(seed)) for seed in range(number)]
    async with httpx.AsyncClient(timeout=ANSWER_S, limits=httpx.Limits(max_connections=None)) as client:
        requests = [asyncio.create_task(client.post(server.url("/predict"), content=image)) for image in images]
        while meanwhile is not None and sum(request.done() for request in requests) < 5:
            await asyncio.sleep(0.001)
        if meanwhile is not None:
            meanwhile()
        return await asyncio.gather(*requests)


def test_a_prediction_is_predictors(server: Server, folder: Path) -> None:
    answer = server.post(path="/predict?masks=true").json()
    expected = describe(Predictor(folder, device="cpu", stitch=answer["stitch"])(IMAGE), masks=True)
    assert {name: answer[name] for name in expected} == expected
    assert answer["deadline"] == dict(ms=DEADLINE_MS, met=True)
    assert answer["stitch"] == httpx.get(server.url("/front")).json()["stitches"][-1]["name"]  # without load, the best
    end = time.monotonic() + RECOVERY_S
    while len(running := server.replicas()) < 2:
        assert time.monotonic() < end, running
        time.sleep(0.5)
    assert len(running) == 2 == len(server.processes(REPLICA))


def test_bad_requests_harm_no_other(server: Server) -> None:
    bad = {
        400: [server.post(b"rubbish"), server.post(huge_png()), server.post(path="/predict?deadline_ms=never")],
        404: [server.post(path="/")],
        413: [server.post(bytes(200_000)), server.post(bytes(50_000) for _ in range(10))],  # type: ignore[arg-type]
        503: [server.post(path="/predict?deadline_ms=0.001")],
    }
    for status, answers in bad.items():
        assert [answer.status_code for answer in answers] == [status] * len(answers), answers
    assert all("error" in answer.json() for answer in bad[400] + bad[413] + bad[503])
    assert "30000 x 30000 pixels, and the limit is 25000000" in bad[400][1].json()["error"]
    assert int(bad[503][0].headers["Retry-After"]) >= 1
    assert server.post().status_code == 200


def test_slow_clients_hinder_nobody(server: Server) -> None:
    """They hold connections open: some have sent a part of the head, some a part of the body."""
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(IMAGE)}\r\n"
    clients = [socket.create_connection(("127.0.0.1", server.port), ANSWER_S) for _ in range(50)]
    try:
        for number, client in enumerate(clients):
            client.sendall((head if number % 2 else f"{head}\r\n").encode() + (b"" if number % 2 else IMAGE[:100]))
        start = time.monotonic()
        answers = asyncio.run(post_together(server, 10))
        assert [answer.status_code for answer in answers] == [200] * 10
        assert time.monotonic() - start < ANSWER_S
        with clients[0].makefile("rb") as stream:
            answer = stream.read()  # until the server closes the connection
        assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 10 s" in answer
    finally:
        for client in clients:
            client.close()
    assert server.post().status_code == 200


def test_200_connections_at_once_are_answered(server: Server) -> None:
    """More than one replica's queue holds: where Ray Serve sends too many to one, the other answers."""
    answers = asyncio.run(post_together(server, 200))
    assert {(answer.status_code, answer.json().get("error")) for answer in answers} == {(200, None)}
    assert max(answer.json()["batch_size"] for answer in answers) > 1


def test_a_killed_replica_costs_no_request(server: Server) -> None:
    """The other one answers, and Ray Serve starts a new one."""
    before = server.replicas()
    victim, other = server.processes(REPLICA)
    start = time.monotonic()
    answers = asyncio.run(post_together(server, 100, victim.kill))
    for answer in answers:
        assert answer.status_code == 200 or (answer.status_code >= 500 and answer.json()["error"]), answer.text
    assert sum(answer.status_code == 200 for answer in answers) >= 50 and time.monotonic() - start < ANSWER_S
    assert server.post().status_code == 200 and other.is_running()
    end = time.monotonic() + RECOVERY_S
    while len(after := server.replicas()) < 2 or set(after) == set(before):
        assert time.monotonic() < end, after
        time.sleep(0.5)
    assert len(set(before) & set(after)) == 1
    assert {answer.status_code for answer in asyncio.run(post_together(server, 20))} == {200}


def test_rays_port_needs_the_servers_token(server: Server) -> None:
    """It would run what any process of the network sends it."""
    (raylet,) = server.processes("/raylet/raylet")
    (address,) = (word.split("=")[1] for word in raylet.cmdline() if word.startswith("--gcs-address="))
    code = f"from ray._raylet import GcsClient; GcsClient({address!r}).get_all_node_info(timeout=10)"
    for variables in ({}, dict(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=64 * "0")):
        environment = {**os.environ, **variables}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and "ray.exceptions.AuthenticationError" in done.stderr, done.stderr


def test_requests_that_run_are_answered_at_the_end(server: Server) -> None:
    """Ctrl-C ends the server, without anything left of it; this is the last test of the shared one."""
    answers = asyncio.run(post_together(server, 40, lambda: server.signal(signal.SIGINT)))
    assert {answer.status_code for answer in answers} == {200}
    server.check_end()
    first, *others = server.stdout.splitlines()[1:]
    assert first.endswith(f": http://127.0.0.1:{server.port} (POST an image to /predict; Ctrl-C ends it)")
    # Ray's own line on the replica that was killed
    assert [line for line in others if "A worker died or was killed" not in line] == []


@pytest.mark.slow
def test_sigterm_ends_the_server_after_its_requests(folder: Path, tmp_path: Path) -> None:
    """A request whose image still arrives is answered: the replicas, idle for seconds, stay until it is."""
    server = Server(folder, tmp_path, "--threads", 1, "--deadline-ms", DEADLINE_MS)
    try:
        server.wait_for_start()
        with socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as client, client.makefile("rb") as answer:
            head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(IMAGE)}\r\nConnection: close\r\n\r\n"
            client.sendall(head.encode() + IMAGE[:100])
            time.sleep(2)
            server.signal(signal.SIGTERM)
            time.sleep(2)
            client.sendall(IMAGE[100:])
            assert answer.read().startswith(b"HTTP/1.1 200 ")
        server.check_end()
        assert len(server.stdout.splitlines()) == 2
    finally:
        server.kill()


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["too many replicas", "a damaged model"])
def test_what_ray_or_a_replica_finds_is_told_in_one_line(folder: Path, mistake: str, tmp_path: Path) -> None:
    replicas, message = 1000, "1000 replicas need 1000 CPUs, and Ray has "
    if mistake == "a damaged model":
        replicas, message, folder = 1, "it is cut short or no checkpoint", copied(folder, tmp_path)
        os.truncate(folder / "model.safetensors", 2000)
    server = Server(folder, tmp_path, "--replicas", replicas, "--threads", 1)
    try:
        assert server.process.wait(START_S) == 2
    finally:
        server.kill()
    assert "Traceback" not in server.stderr and message in server.stderr.splitlines()[-1]
    assert len(server.stdout.splitlines()) == 1
