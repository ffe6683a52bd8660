"""Times of attention with a relative position bias (fused kernel or materialised) and in windows.

All variants take turns in one process. Ratios are those of the medians to the median of the plain anchor.

    python benchmarks/attention.py [--model deit3_small_patch16_224] [--size 512] [--window 16] [--repeats 7] [--train]
"""

import argparse
import platform
import statistics
import time
from contextlib import nullcontext

import torch
from torch import Tensor

from mmsnnet.stitching import Anchor, create_anchor


def forward(anchor: Anchor, images: Tensor) -> Tensor:
    *_, (_, features) = anchor.run(anchor.stem(images))
    return features.to(anchor.layout()).data


def seconds(anchor: Anchor, images: Tensor, train: bool) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    tokens = forward(anchor, images)
    if train:
        anchor.zero_grad()
        tokens.square().mean().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit3_small_patch16_224")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = {
        "plain": {},
        "bias, fused": dict(rel_pos_bias=True),
        "bias, materialised": dict(rel_pos_bias=True),
        f"windows of {args.window}": dict(window_size=args.window),
        f"windows of {args.window}, bias": dict(window_size=args.window, rel_pos_bias=True),
    }
    anchors = {way: create_anchor(args.model, args.size, **options).to(device).eval() for way, options in ways.items()}
    for block in anchors["bias, materialised"].model.blocks:
        block.attn.fused_attn = False
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    print(
        f"{args.model} at {args.size}, batch {args.batch}, {'forward and backward' if args.train else 'forward'}, "
        f"{device}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}; medians of {args.repeats}"
    )
    times: dict[str, list[float]] = {way: [] for way in ways}
    with nullcontext() if args.train else torch.inference_mode():
        for repeat in range(args.repeats + 1):
            for way, anchor in anchors.items():
                took = seconds(anchor, images, args.train)
                if repeat:  # the first round warms up
                    times[way].append(took)
    plain = statistics.median(times["plain"])
    for way, values in times.items():
        print(f"{way:>24}: {statistics.median(values):.3f} s, {statistics.median(values) / plain:.2f} times the plain")


if __name__ == "__main__":
    main()
