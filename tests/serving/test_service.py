"""What the gateway asks the replicas through Ray Serve ends with the gateway's own request."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from mmsnnet.errors import SettingError
from mmsnnet.serving.gateway import GatewaySettings
from mmsnnet.serving.replica import ReplicaSettings
from mmsnnet.serving.service import ReplicaHandle, ServiceSettings, connect, start


class Hanging:
    """A response that never comes. As Ray Serve's, it tells the replica only if it is cancelled itself."""

    cancelled = False

    def __await__(self) -> Any:
        return asyncio.sleep(60).__await__()

    def cancel(self) -> None:
        self.cancelled = True


def test_a_request_that_no_one_waits_for_ends_in_the_replica_too() -> None:
    response = Hanging()
    method = SimpleNamespace(remote=lambda *_: response)
    handle = cast("DeploymentHandle", SimpleNamespace(answer=method))

    async def job() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ReplicaHandle(handle, CollectorRegistry(), "gateway").answer(b"", 1.0, False), 0.05)

    asyncio.run(job())
    assert response.cancelled


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TimeoutError("HTTP proxies not available after 60s."), "HTTP proxies not available after 60s."),
        (RayActorError(), "The actor experienced an error"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_keeps_ray_serve_from_starting_is_told(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **settings: Any) -> None:
        raise error

    def status() -> None:
        raise RayServeException("There is no Serve instance running on this Ray cluster.")

    monkeypatch.setattr(serve, "start", fail)
    monkeypatch.setattr(serve, "status", status)
    replica = ReplicaSettings(Path(), None, "cpu", 1, None, "look-ahead", deadline_ms=100, max_waiting=8, max_pixels=9)
    gateway = GatewaySettings(100, max_upload_bytes=9, token=None, front={}, replicas=1)
    with pytest.raises(SettingError, match=f"^{message}"):
        start(ServiceSettings("127.0.0.1", 8000, replicas=1, cpus=1, gpus=0), replica, gateway)


@pytest.mark.parametrize(("address", "failures", "attempts"), [(None, 1, 2), (None, 2, 2), ("host:6379", 1, 1)])
def test_a_ray_of_our_own_gets_a_second_attempt_to_start(
    address: str | None, failures: int, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []

    def init(place: str, **settings: Any) -> None:
        places.append(place)
        if len(places) <= failures:
            raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: dict(CPU=2.0))
    service = ServiceSettings("127.0.0.1", 8000, replicas=1, cpus=1, gpus=0, address=address)
    if failures < attempts:
        connect(service)
    else:
        with pytest.raises(SettingError, match=r"^there is no Ray .*timed out"):
            connect(service)
    assert places == [address or "local"] * attempts
