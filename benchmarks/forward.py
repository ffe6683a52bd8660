"""The forward of a stitch and the bare sum of its parts, side by side in one process.

The bare side calls the same timm modules and stitching layers in a plain loop, without taps or bookkeeping. Plain ViTs
give the map of the last block, hierarchical models logits. Both sides take turns; the ratio is that of their medians.

    python benchmarks/forward.py [--pair deit3] [--size 512] [--repeats 15] [--stitches 0,1,57,80] [--cpu-time]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsnnet.stitching import Stitch, StitchedNetwork, StitchSpace, create_anchor

# Two models of timm, the size of images, and some stitches.
PAIRS = dict(
    deit3=("deit3_small_patch16_224", "deit3_large_patch16_224", 512, "0,1,57,80"),
    swin=("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", 224, "0,1,S2.2-L2.9,L1.1-S2.0-L3.0"),
    convnext=("convnext_tiny", "convnext_small", 224, "0,1,S2.4-L2.15,L1.2-S2.0-L3.0"),
    resnet=("resnet18", "resnet50", 224, "0,1,S2.0-L2.3,L1.3-S2.0-L3.0"),
    levit=("levit_192", "levit_256", 224, "0,1,S1.1-L1.2,L0.3-S1.0-L2.0"),
)


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


def parts(model: Any) -> tuple[Callable[..., Tensor], list[list[nn.Module]], Callable[..., Tensor]]:
    """The stem, the modules of each block, and what follows them, of a hierarchical model of timm."""
    name = type(model).__name__
    if name == "ResNet":
        stages = model.layer1, model.layer2, model.layer3, model.layer4
        stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
        return stem, [[block] for stage in stages for block in stage], model.forward_head
    stages = model.layers if name == "SwinTransformer" else model.stages
    blocks = [
        [stage.downsample, block] if i == 0 else [block] for stage in stages for i, block in enumerate(stage.blocks)
    ]
    if name == "SwinTransformer":
        return model.patch_embed, blocks, lambda x: model.forward_head(model.norm(x))
    if name == "ConvNeXt":
        return model.stem, blocks, lambda x: model.forward_head(model.norm_pre(x))
    return lambda images: model.stem(images).flatten(2).transpose(1, 2), blocks, model.forward_head


def bare_staged(network: StitchedNetwork, stitch: Stitch) -> Callable[[Tensor], Tensor]:
    """A plain loop over what a route of hierarchical models runs, from images to logits."""
    divided = [parts(anchor.model) for anchor in network.anchors]
    modules: list[Callable[..., Tensor]] = [divided[stitch.segments[0].anchor][0]]
    for segment, key in zip(stitch.segments, (*stitch.layers, None), strict=True):
        for block in divided[segment.anchor][1][segment.start : segment.stop]:
            modules += block
        if key is not None:
            layer = network.layers[str(key)]
            of_maps = network.anchors[segment.anchor].layout().format == "nchw"
            modules.append(as_convolution(layer) if of_maps else layer)
    modules.append(divided[stitch.segments[-1].anchor][2])

    def run(images: Tensor) -> Tensor:
        x = images
        for module in modules:
            x = module(x)
        return x

    return run


def as_convolution(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A stitching layer of rank 0 as a convolution of 1 x 1."""
    weight = layer.weight[:, :, None, None]
    return lambda x: F.conv2d(x, weight, layer.bias)


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="deit3")
    parser.add_argument("--size", type=int, help="side of the images; the pair's by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--stitches", help="ids or names; a few of the pair's by default")
    parser.add_argument("--cpu-time", action="store_true", help="time of the process alone, where others run beside it")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *models, size, stitches = PAIRS[args.pair]
    size, staged = args.size or size, args.pair != "deit3"
    fast = {} if staged else dict(weight_init="skip")
    anchors = [create_anchor(model, size, classifier=staged, **fast) for model in models]
    space = StitchSpace.two_way([anchor.stages for anchor in anchors])
    network = StitchedNetwork(anchors, space, rank=0 if staged else 16).eval().to(device)
    if not staged:
        for parameter in network.parameters():  # the weights were never drawn: memory may hold NaN
            nn.init.normal_(parameter, std=0.02)
    images = torch.randn(args.batch, 3, size, size, device=device)
    last = (anchors[-1].depth - 1,)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(
        f"{' + '.join(models)} at {size}, batch {args.batch}, {device}, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}; medians of {args.repeats}"
        f"{', of CPU time' if args.cpu_time else ''}"
    )
    for stitch in space.select(args.stitches or stitches):
        if staged:
            loop = bare_staged(network, stitch)
            sides = dict(stitched=lambda s=stitch: network.classify(images, s), bare=lambda f=loop: f(images))
        else:
            sides = dict(
                stitched=lambda s=stitch: network(images, s, last)[0], bare=lambda s=stitch: bare(network, s, images)
            )
        torch.testing.assert_close(sides["stitched"](), sides["bare"]())
        times: dict[str, list[float]] = {"stitched": [], "bare": []}
        for repeat in range(args.repeats):
            for side in sorted(times, reverse=repeat % 2 == 0):
                times[side].append(seconds(sides[side], clock))
        stitched, plain = (statistics.median(values) for values in times.values())
        print(
            f"{stitch!s:>18}: stitched {stitched:.4f} s, bare {plain:.4f} s, ratio {stitched / plain:.3f}", flush=True
        )


if __name__ == "__main__":
    main()
