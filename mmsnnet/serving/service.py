"""The server on Ray Serve: gateways that speak HTTP, and replicas of the model."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import ray
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from mmsnnet.errors import SettingError
from mmsnnet.serving.answers import Answer
from mmsnnet.serving.gateway import Gateway, GatewaySettings, NoReplicaError, ReplicaLostError, labelled

if TYPE_CHECKING:
    from mmsnnet.serving.replica import ReplicaSettings

# Two applications of Ray Serve: the deployments of one end together, and the gateways need the replicas to the last.
GATEWAY_APPLICATION, REPLICA_APPLICATION = "mmsnnet-gateway", "mmsnnet"
REPLICAS = "Replica"
# How long a question to all replicas may take.
BROADCAST_S = 2.0
# Requests that run when the server ends may take this long.
GRACE_S = 10.0
# Requests of a replica that are decoded, run or answered; those that wait come on top.
BESIDE_QUEUE = 64
# Requests that a gateway handles at the same time, and that wait for it.
MOST_REQUESTS = 1000


class ReplicaHandle:
    """The replicas, through Ray Serve's handle: the gateway's backend.

    Args:
        replicas: the handle of the replicas' deployment.
        registry: the gateway's own metrics.
        name: of the gateway.
    """

    def __init__(self, replicas: DeploymentHandle, registry: CollectorRegistry, name: str) -> None:
        self.replicas, self.registry, self.name = replicas, registry, name
        self._answers: dict[str, list[Any]] = {}

    async def answer(self, body: bytes, left_ms: float, masks: bool) -> Answer:
        response = self.replicas.answer.remote(body, left_ms, masks)
        try:
            return await response
        except asyncio.CancelledError:  # no one waits any more; Ray Serve alone would not tell the replica
            response.cancel()
            raise
        except BackPressureError as error:
            raise NoReplicaError("all replicas are busy") from error
        except DeploymentUnavailableError as error:
            raise NoReplicaError("no replica runs") from error
        except RayTaskError as error:
            logging.getLogger("ray.serve").exception("a replica failed")
            return Answer(500, dict(error=f"the model failed: {str(error).splitlines()[-1]}"))
        except (RayError, ReplicaUnavailableError) as error:  # of the replica's process, machine or connection
            raise ReplicaLostError(str(error)) from error

    async def states(self) -> list[dict[str, Any]]:
        return await self._ask_all("state")

    async def metrics(self) -> list[Sequence[Metric]]:
        return [labelled(self.registry, self.name), *await self._ask_all("metrics")]

    async def _ask_all(self, method: str) -> list[Any]:
        """What each replica returns. Where one does not answer in time, what all returned before."""
        try:
            answers = self.replicas.broadcast(method)
            results = await answers.results_async(timeout_s=BROADCAST_S, return_exceptions=True)
        except TimeoutError:
            return self._answers.get(method, [])
        except (RayError, DeploymentUnavailableError):
            return []
        self._answers[method] = [result for result in results if not isinstance(result, Exception)]
        return self._answers[method]


def gateway_app(settings: GatewaySettings) -> Starlette:
    """The application of a gateway, in its process."""
    registry = CollectorRegistry()
    name = f"gateway-{serve.get_replica_context().replica_id.unique_id}"
    replicas = serve.get_deployment_handle(REPLICAS, app_name=REPLICA_APPLICATION)
    return Gateway(ReplicaHandle(replicas, registry, name), settings, registry).app


@dataclass(frozen=True)
class ServiceSettings:
    """How the server runs on Ray.

    Attributes:
        host, port: to answer on.
        replicas: how many models.
        cpus, gpus: that Ray reserves for each.
        address: of a running Ray cluster; None starts Ray on this machine.
    """

    host: str
    port: int
    replicas: int
    cpus: float
    gpus: float
    address: str | None = None


def connect(service: ServiceSettings) -> None:
    """Start Ray, or connect to a cluster.

    Raises:
        SettingError: there is no such cluster, Ray does not start, or it has too few CPUs or GPUs.
    """
    quiet: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR)
    # "local" starts a Ray even if this machine is in a cluster.
    local: dict[str, Any] = dict(include_dashboard=False, _node_ip_address="127.0.0.1")
    # Ray gives itself 30 s to start. A busy machine may need longer to load it; a second attempt finds it in memory.
    attempts = 2 if service.address is None else 1
    for attempt in range(1, attempts + 1):
        try:
            ray.init(service.address or "local", **quiet, **(local if service.address is None else {}))
            break
        except Exception as error:  # Ray's errors of this have no common class
            if attempt == attempts:
                place = "on this machine" if service.address is None else f"at {service.address}"
                raise SettingError(f"there is no Ray {place}: {error}") from error
            ray.shutdown()
    _check_resources(service)


def start(service: ServiceSettings, replica: ReplicaSettings, gateway: GatewaySettings) -> None:
    """Start the server and wait until it answers.

    Raises:
        SettingError: a replica cannot start, Ray Serve runs already on another port, or it does not start in time; the
            message says why.
    """
    # The gateway's process does without torch and mmengine.
    from mmsnnet.serving.replica import Replica

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    logs = LoggingConfig(log_level="WARNING", enable_access_log=False)
    ending: dict[str, Any] = dict(graceful_shutdown_wait_loop_s=0.2, graceful_shutdown_timeout_s=GRACE_S)
    replicas = serve.deployment(
        name=REPLICAS,
        num_replicas=service.replicas,
        ray_actor_options=dict(num_cpus=service.cpus, num_gpus=service.gpus),
        # The replicas' own queues know deadlines; Ray Serve's does not, so it should stay empty. Requests on
        # their way to a replica count as waiting there: a lower limit than the gateway's would refuse bursts.
        max_ongoing_requests=replica.max_waiting + BESIDE_QUEUE,
        max_queued_requests=MOST_REQUESTS,
        health_check_period_s=5,
        health_check_timeout_s=30,
        # A replica that cannot start will not do so at the second attempt. One that ran is always started again.
        max_constructor_retry_count=1,
        logging_config=logs,
        **ending,
    )(Replica).bind(replica)

    def build() -> Starlette:
        return gateway_app(gateway)

    gateways = serve.deployment(
        name="Gateway",
        ray_actor_options=dict(num_cpus=0),
        max_ongoing_requests=MOST_REQUESTS,
        max_queued_requests=MOST_REQUESTS,
        logging_config=logs,
        **ending,
    )(serve.ingress(build)()).bind()
    options = dict(host=service.host, port=service.port, location="EveryNode" if service.address else "HeadOnly")
    try:
        serve.start(http_options=options, logging_config=logs)
        serve.run(replicas, name=REPLICA_APPLICATION, route_prefix=None)
        serve.run(gateways, name=GATEWAY_APPLICATION, route_prefix="/")
        _check_answers(service)
    except (RayError, RuntimeError, TimeoutError) as error:
        messages = []
        with suppress(RayError, RayServeException):  # Ray Serve does not run
            messages = _failures()
        raise SettingError(_reason("\n".join(messages) or str(error) or type(error).__name__)) from error


def stop() -> None:
    """End the server: requests that run are answered, for up to ``GRACE_S``. Other applications of a cluster go on."""
    if not ray.is_initialized():
        return
    with suppress(RayServeException):  # Ray Serve does not run
        serve.delete(GATEWAY_APPLICATION)  # waits for its requests
        serve.delete(REPLICA_APPLICATION)
    ray.shutdown()  # ends a Ray of our own


def _check_answers(service: ServiceSettings) -> None:
    """Check that the server answers on its port: a Ray Serve that runs already keeps its own.

    The question also connects the gateway to the replicas, for which the first request would wait.
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(service.host, service.host)
    try:
        directly = build_opener(ProxyHandler({}))  # whatever http_proxy is
        directly.open(f"http://{host}:{service.port}/health", timeout=30).close()
    except HTTPError:  # it answers
        pass
    except OSError as error:
        raise SettingError(
            f"nothing answers on {host}:{service.port} ({error}): Ray Serve of this cluster runs already, on another "
            "host or port. Set --host and --port as there, or end it with `serve shutdown`"
        ) from error


def _check_resources(service: ServiceSettings) -> None:
    """Check that the cluster has room for the replicas, for which Ray would wait."""
    cluster = ray.cluster_resources()
    for name, each in (("CPU", service.cpus), ("GPU", service.gpus)):
        if service.replicas * each > cluster.get(name, 0):
            raise SettingError(
                f"{service.replicas} replicas need {service.replicas * each:g} {name}s, and Ray has "
                f"{cluster.get(name, 0):g}: lower --replicas or --threads"
            )


def _failures() -> list[str]:
    """What Ray Serve reports of our deployments that have failed."""
    running = serve.status().applications
    ours = [running[name] for name in (REPLICA_APPLICATION, GATEWAY_APPLICATION) if name in running]
    deployments = [deployment for application in ours for deployment in application.deployments.values()]
    return [deployment.message for deployment in deployments if deployment.status == "DEPLOY_FAILED"]


def _reason(text: str) -> str:
    """The error of a replica that could not start, from Ray Serve's report, which holds a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(mmsnnet\.errors\.)?\w+Error: ", line)]
    return re.sub(r"^mmsnnet\.errors\.\w+: ", "", errors[-1] if errors else lines[-1])
