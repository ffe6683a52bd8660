"""The forward of a stitch and the bare sum of its parts, side by side in one process.

The bare side calls the same timm blocks, stem and stitching layers in a plain loop, without taps or bookkeeping. Both
sides alternate; the ratio is that of their medians.

    python benchmarks/forward.py [--size 512] [--repeats 15] [--stitches 0,1,57,80]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmsnnet.stitching import Stitch, StitchedNetwork, StitchSpace, create_anchor


def bare(network: StitchedNetwork, stitch: Stitch, images: Tensor) -> Tensor:
    """Stem, blocks and stitching layers of a route in a plain loop, and the map of its last tokens."""
    model = network.anchors[stitch.segments[0].anchor].model
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
        for block in network.anchors[segment.anchor].model.blocks[segment.start : segment.stop]:
            tokens = block(tokens)
        if layer is not None:
            tokens = network.layers[str(layer)](tokens)
    if stitch.segments[-1].anchor == 0:
        tokens = network.layers[str(network.space.layers[network.space.depths[0] - 1])](tokens)
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).reshape(tokens.shape[0], -1, side, side).contiguous()


def seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--stitches", default="0,1,57,80")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = ("deit3_small_patch16_224", "deit3_large_patch16_224")
    anchors = [create_anchor(model, args.size, weight_init="skip") for model in models]
    space = StitchSpace.two_way([anchor.depth for anchor in anchors])
    network = StitchedNetwork(anchors, space, rank=16).eval().to(device)
    for parameter in network.parameters():  # the weights were never drawn: memory may hold NaN
        nn.init.normal_(parameter, std=0.02)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    last = (anchors[-1].depth - 1,)
    print(
        f"{' + '.join(models)} at {args.size}, batch {args.batch}, {device}, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}; medians of {args.repeats}"
    )
    for stitch in space.select(args.stitches):
        ours, theirs = network(images, stitch, last)[0], bare(network, stitch, images)
        torch.testing.assert_close(ours, theirs)
        times: dict[str, list[float]] = {"stitched": [], "bare": []}
        for _ in range(args.repeats):
            times["stitched"].append(seconds(lambda stitch=stitch: network(images, stitch, last)))
            times["bare"].append(seconds(lambda stitch=stitch: bare(network, stitch, images)))
        stitched, plain = (statistics.median(values) for values in times.values())
        print(f"{stitch!s:>18}: stitched {stitched:.4f} s, bare {plain:.4f} s, ratio {stitched / plain:.3f}")


if __name__ == "__main__":
    main()
