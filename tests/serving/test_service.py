"""What the gateway asks the replicas through Ray Serve ends with the gateway's own request."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

pytest.importorskip("ray.serve")

from ray.serve.handle import DeploymentHandle

from mmsnnet.serving.service import ReplicaHandle


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
