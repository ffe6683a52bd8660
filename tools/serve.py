"""Serves a model over HTTP on Ray Serve: the stitch follows the load.

FOLDER is a model as ``tools/misc/publish_model.py ... --points FILE.json`` or ``tools/deployment/export.py`` writes it.
Each request has a deadline. A replica runs the best stitch that lets all its requests meet theirs.
"""

import argparse
import io
import math
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import torch

from mmsnnet.apis.publish import CONFIG, FRONT
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.cli.ports import free_port, url_of
from mmsnnet.deployment.manifest import MANIFEST, Manifest
from mmsnnet.errors import MissingFileError, SettingError, needs_extra
from mmsnnet.evaluation import OperatingPoints, default_metric
from mmsnnet.files.locking import locked
from mmsnnet.serving.policy import LONGEST_DEADLINE_MS, POLICIES

TOKEN = "MMSNNET_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=os.path.expanduser, metavar="FOLDER", help="a published model, or an export")
    parser.add_argument(
        "--deadline-ms", type=float, default=100, metavar="MS", help="for an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--points", type=os.path.expanduser, metavar="FILE.json", help="operating points (default: FOLDER/front.json)"
    )
    parser.add_argument("--metric", help="compares stitches (default: the task's own)")
    parser.add_argument(
        "--policy",
        default="look-ahead",
        help="look-ahead, slackfit, greedy, or a stitch that always runs (%(default)s)",
    )
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="models that run (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of each replica on a CPU (default: all CPUs, divided)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU for each replica if there is one")
    parser.add_argument(
        "--max-waiting", type=int, default=128, metavar="N", help="longest queue of a replica (%(default)s)"
    )
    parser.add_argument("--max-upload-mb", type=float, default=20, metavar="MB", help="largest file (%(default)s)")
    parser.add_argument("--max-megapixels", type=float, default=25, metavar="MP", help="largest image (%(default)s)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"address to answer on; others than this machine's need ${TOKEN} (%(default)s)",
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--address", help="of a running Ray cluster, such as auto (default: start Ray on this machine)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("deadline_ms", "replicas", "threads", "max_waiting", "max_upload_mb", "max_megapixels"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise SettingError(f"--{name.replace('_', '-')} is positive and finite, got {value:g}")
    if args.deadline_ms > LONGEST_DEADLINE_MS:
        raise SettingError(f"--deadline-ms is at most {LONGEST_DEADLINE_MS}, got {args.deadline_ms:g}")
    if args.address is not None and (args.device is None or (args.device == "cpu" and args.threads is None)):
        raise SettingError(
            "--address needs --device, and --threads with --device cpu: machines of a cluster may differ"
        )
    if args.host not in LOOPBACK and not os.environ.get(TOKEN):
        raise SettingError(
            f"--host {args.host} can be reached from other machines: set the environment variable {TOKEN}, which "
            "requests then send as 'Authorization: Bearer TOKEN'"
        )


@contextmanager
def port_of_one_server(host: str, port: int) -> Iterator[None]:
    """Keep a free port for this server. Ray Serve shares its own: two servers would divide the requests.

    Raises:
        SettingError, LockedError: the port is not free, or another server is about to take it.
    """
    free_port(host, (port,))
    with locked(Path(tempfile.gettempdir(), f"mmsnnet-{os.getuid()}-{host}-{port}"), wait=0, option="--port"):
        yield


def prepare_ray(address: str | None) -> None:
    """Set what Ray reads when it is imported.

    It sends no telemetry. A Ray of our own also gets the usual priority, more time to start its proxy, and a token.
    Ray's processes have a low priority by default, so any other work would slow the replicas down. Ray Serve restarts a
    proxy that is not ready after 5 s, which it may never be on a busy machine.
    Ray's ports, some of which other machines can reach, run what they are sent. With the token they take it from the
    processes of this server alone.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def read_points(args: argparse.Namespace) -> OperatingPoints:
    """The operating points that the server chooses from; checks the folder."""
    folder = Path(args.folder)
    if not (folder / CONFIG).is_file():
        raise MissingFileError(f"{folder} has no {CONFIG}: expected a folder of publish_model.py or export.py")
    path = Path(args.points or folder / FRONT)
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist, and a server chooses among operating points: publish_model.py ... --points "
            "FILE.json writes it, or set --points"
        )
    points = OperatingPoints.load(path)
    metric = args.metric or default_metric(points)
    for point in points:
        point.metric(metric)
    names = [point.name for point in points]
    exported = [stitch.name for stitch in Manifest.load(folder).stitches] if (folder / MANIFEST).is_file() else names
    if missing := [name for name in names if name not in exported]:
        raise SettingError(f"{path} has stitch {missing[0]}, which the export lacks: it has {', '.join(exported)}")
    if args.policy not in POLICIES and args.policy not in names:
        raise SettingError(
            f"--policy is one of {', '.join(POLICIES)}, or a stitch, such as {names[0]}; got {args.policy!r}"
        )
    return points


def end_by_signals() -> None:
    """Let SIGTERM end the server as Ctrl-C does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def serve(args: argparse.Namespace) -> None:
    check_arguments(args)
    with port_of_one_server(args.host, args.port) if args.address is None else nullcontext():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    with user_errors():
        points = read_points(args)
    prepare_ray(args.address)
    with needs_extra("serve"), redirect_stdout(io.StringIO()):  # toolboxes print that optional packages are missing
        from mmsnnet.serving.calibration import servable
        from mmsnnet.serving.gateway import GatewaySettings
        from mmsnnet.serving.replica import ReplicaSettings
        from mmsnnet.serving.service import ServiceSettings, connect, start, stop
    is_export = Path(args.folder, MANIFEST).is_file()
    device = args.device or ("cuda" if torch.cuda.is_available() and not is_export else "cpu")
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.replicas)
    title = Path(args.folder).resolve().name
    replica = ReplicaSettings(
        folder=Path(args.folder).resolve(),
        points=Path(args.points).resolve() if args.points else None,
        device=device,
        threads=threads if device == "cpu" else None,
        metric=args.metric,
        policy=args.policy,
        deadline_ms=args.deadline_ms,
        max_waiting=args.max_waiting,
        max_pixels=int(args.max_megapixels * 1e6),
    )
    gateway = GatewaySettings(
        deadline_ms=args.deadline_ms,
        max_upload_bytes=int(args.max_upload_mb * 2**20),
        token=os.environ.get(TOKEN) or None,
        front=dict(
            model=title,
            metric=args.metric or default_metric(points),
            deadline_ms=args.deadline_ms,
            policy=args.policy,
            stitches=[point.to_json() for point in servable(points, args.metric)],
        ),
        replicas=args.replicas,
    )
    service = ServiceSettings(
        host=args.host,
        port=args.port,
        replicas=args.replicas,
        cpus=threads if device == "cpu" else 1,
        gpus=1 if device == "cuda" else 0,
        address=args.address,
    )
    print(f"{title}: starting {args.replicas} replica{'s' * (args.replicas > 1)} ...", flush=True)
    try:
        end_by_signals()
        connect(service)
        end_by_signals()  # Ray has set its own handler of SIGTERM
        start(service, replica, gateway)
        print(f"{title}: {url_of(args.host, args.port)} (POST an image to /predict; Ctrl-C ends it)", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        ignore_signals()  # ending takes seconds
        stop()


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_user_error(parser):
        serve(args)


if __name__ == "__main__":
    main()
