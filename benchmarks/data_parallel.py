"""Gradient averaging for a stitched model: mmsnnet.StitchedDataParallel and its alternatives.

Each rank has one classifier for each method, with the same weights and draws. They take turns, with one forward and one
backward pass each on random images. "each rank for itself" sends nothing: the difference to it is the added time.
The gradients of all methods that average must be equal to the bit.

Sent: bytes that a rank passes to all-reduces in an iteration, on average. Memory: bytes of gradients and buckets at the
end of a backward pass, the maximum over the iterations. DistributedDataParallel keeps buckets for the whole model.

    python benchmarks/data_parallel.py [--ranks 2] [--widths 192 384] [--depths 12 24] [--size 64] [--batch 2]
        [--rounds 30] [--bucket-cap-mb 25] [--device cpu|cuda] [--threads 1]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch.multiprocessing
from mmengine.model import MMDistributedDataParallel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mmsnnet.apis.benchmark import device_name
from mmsnnet.models import StitchedClassifier, StitchedDataParallel
from mmsnnet.stitching import Stitch

MIB = 2**20
HEADINGS = ("way", "time", "to itself", "added", "sent", "memory")


class Way:
    """A model, wrapped by one method or not wrapped.

    Args:
        wrap: the wrapper of a model.
        memory: the bytes in use, from the bytes of the gradients and of all parameters.
    """

    def __init__(
        self,
        model: StitchedClassifier,
        wrap: Callable[[StitchedClassifier], nn.Module] = lambda model: model,
        memory: Callable[[int, int], int] = lambda gradients, parameters: gradients,
    ) -> None:
        self.model = model
        self.wrapped = wrap(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.bytes = sum(parameter.numel() * parameter.element_size() for parameter in self.trained)
        self.times: list[float] = []
        self.sent: list[int] = []
        self.held: list[int] = []
        self._memory = memory

    def step(self, images: Tensor) -> None:
        """Run one forward and one backward pass; keep the gradients."""
        self.wrapped.zero_grad()
        self.sent.append(0)
        dist.barrier()
        start = time.perf_counter()
        self.wrapped(images, mode="tensor").square().mean().backward()
        if images.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - start)
        storages = [p.grad.untyped_storage() for p in self.trained if p.grad is not None]
        self.held.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))

    @property
    def memory(self) -> int:
        """The maximum of bytes of gradients and buckets."""
        return self._memory(max(self.held), self.bytes)


def skipping(way: Way) -> Callable[[None, dist.GradBucket], torch.futures.Future[Tensor]]:
    """A hook for DistributedDataParallel that reduces only buckets with parameters of the drawn stitch."""
    used: dict[Stitch, set[nn.Parameter]] = {}

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        backbone = way.model.backbone
        if backbone.drawn not in used:
            used[backbone.drawn] = set(backbone.trained_parameters(backbone.drawn))
        if used[backbone.drawn].isdisjoint(bucket.parameters()):
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done
        return allreduce_hook(dist.group.WORLD, bucket)

    return hook


def make_ways(args: argparse.Namespace, device: torch.device) -> dict[str, Way]:
    def model() -> StitchedClassifier:
        torch.manual_seed(0)
        anchors = [
            dict(model="deit3_small_patch16_224", embed_dim=width, depth=depth, num_heads=width // 32)
            for width, depth in zip(args.widths, args.depths, strict=True)
        ]
        made = StitchedClassifier(
            dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=args.size, flops_step=1e7), num_classes=1000
        )
        for layer in made.backbone.network.layers.values():
            layer.set_base(layer.weight, layer.bias)
        return made.to(device)

    def ddp(model: StitchedClassifier, **kwargs: Any) -> MMDistributedDataParallel:
        ids = [device.index] if device.type == "cuda" else None
        settings = dict(find_unused_parameters=True, broadcast_buffers=False, bucket_cap_mb=args.bucket_cap_mb)
        return MMDistributedDataParallel(model, device_ids=ids, **settings, **kwargs)

    ways = {
        "each rank for itself": Way(model()),
        "DDP(find_unused_parameters)": Way(model(), ddp, lambda gradients, parameters: gradients + parameters),
        # Its gradients are views of the buckets.
        "DDP, skipping unused buckets": Way(
            model(), lambda model: ddp(model, gradient_as_bucket_view=True), lambda gradients, parameters: parameters
        ),
        "StitchedDataParallel": Way(model(), lambda model: StitchedDataParallel(model, args.bucket_cap_mb)),
    }
    skipped = ways["DDP, skipping unused buckets"]
    skipped.wrapped.register_comm_hook(None, skipping(skipped))
    return ways


def measure(rank: int, args: argparse.Namespace, store: str) -> None:
    """The work of one rank; rank 0 prints the report."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=args.ranks)
    ways = make_ways(args, device)
    ddp, skipped, reduced = list(ways.values())[1:]
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *rest: Any, **kwargs: Any) -> Any:
        way.sent[-1] += tensor.nbytes
        return all_reduce(tensor, *rest, **kwargs)

    dist.all_reduce = counting
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    warm_up = 3  # DistributedDataParallel arranges its buckets anew after the first iteration
    for _ in range(warm_up + args.rounds):
        for way in ways.values():
            way.step(images)
        # DDP sends by itself: its buckets, and, with or without a hook, a number for each parameter (who has used it).
        ddp.sent[-1] += ddp.bytes + 4 * len(ddp.trained)
        skipped.sent[-1] += 4 * len(skipped.trained)
        for averaged in (skipped, reduced):
            for one, other in zip(ddp.trained, averaged.trained, strict=True):
                if (one.grad is None) != (other.grad is None) or not (one.grad is None or one.grad.equal(other.grad)):
                    raise AssertionError("the ways do not agree on gradients")
    if rank == 0:
        report(args, device, ways, warm_up)
    dist.barrier()
    dist.destroy_process_group()


def report(args: argparse.Namespace, device: torch.device, ways: dict[str, Way], warm_up: int) -> None:
    console = Console(width=110)
    console.print(
        f"{args.ranks} ranks on {device_name(device)}, {args.threads} threads each, torch {torch.__version__}; widths "
        f"{args.widths}, depths {args.depths}, batches of {args.batch} of {args.size} x {args.size}, "
        f"{next(iter(ways.values())).bytes / MIB:.0f} MiB of trained parameters; medians of {args.rounds}, ratios "
        "within each round"
    )
    table = Table(*HEADINGS)
    alone = next(iter(ways.values())).times[warm_up:]
    for name, way in ways.items():
        times = way.times[warm_up:]
        ratio = statistics.median(time / own for time, own in zip(times, alone, strict=True))
        added = statistics.median(time - own for time, own in zip(times, alone, strict=True))
        table.add_row(
            name,
            f"{1000 * statistics.median(times):.0f} ms",
            f"{ratio:.2f}",
            f"{1000 * added:.0f} ms",
            f"{statistics.mean(way.sent[warm_up:]) / MIB:.1f} MiB",
            f"{way.memory / MIB:.0f} MiB",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--widths", nargs=2, type=int, default=[192, 384])
    parser.add_argument("--depths", nargs=2, type=int, default=[12, 24])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--bucket-cap-mb", type=float, default=25)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # spawn ends the other ranks if one fails; they would wait for it.
        torch.multiprocessing.spawn(measure, args=(args, f"{folder}/store"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
