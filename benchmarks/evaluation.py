"""The test loop over all stitches with and without shared prefixes, side by side.

A segmentor of two anchors of 12 and 24 blocks, half as wide as DeiT-III's S and L, with SETR's head and mIoU, over
procedural images. The time includes loading, heads and metrics. The figures of both must be equal.

    python benchmarks/evaluation.py [--widths 192 512] [--size 256] [--images 2] [--repeats 3]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmsnnet.datasets import write_shapes
from mmsnnet.datasets.procedural.shapes import CLASSES, PALETTE
from mmsnnet.models import model_costs


def config(folder: Path, widths: list[int], size: int, images: int) -> Config:
    data_root = write_shapes(folder / "set", "shapes", train=1, val=images, size=(size, size))
    anchors = [
        dict(model=f"deit3_{name}_patch16_224", embed_dim=width, depth=depth, num_heads=width // 32)
        for name, width, depth in zip(("small", "large"), widths, (12, 24), strict=True)
    ]
    norm = dict(type="BN")
    return Config(
        dict(
            default_scope="mmseg",
            work_dir=str(folder / "work_dir"),
            log_level="ERROR",
            model=dict(
                type="mmsnnet.EncoderDecoder",
                data_preprocessor=dict(type="SegDataPreProcessor", mean=[127.5] * 3, std=[60.0] * 3),
                backbone=dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=size, out_indices=(23,)),
                decode_head=dict(
                    type="SETRUPHead",
                    in_channels=widths[-1],
                    channels=64,
                    num_classes=8,
                    num_convs=1,
                    up_scale=4,
                    kernel_size=1,
                    norm_cfg=norm,
                    align_corners=False,
                ),
                test_cfg=dict(mode="whole"),
            ),
            test_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type="DefaultSampler", shuffle=False),
                dataset=dict(
                    type="BaseSegDataset",
                    data_root=str(data_root),
                    metainfo=dict(classes=CLASSES, palette=[list(colour) for colour in PALETTE]),
                    img_suffix=".jpg",
                    seg_map_suffix=".png",
                    reduce_zero_label=True,
                    data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
                    pipeline=[dict(type=name) for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")],
                ),
            ),
            test_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            test_cfg=dict(type="mmsnnet.StitchTestLoop"),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs=2, type=int, default=[192, 512])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner.from_cfg(config(Path(folder), args.widths, args.size, args.images))
        for layer in runner.model.backbone.network.layers.values():
            layer.set_base(layer.weight, layer.bias)
        start = time.perf_counter()
        model_costs(runner.model)
        counting = time.perf_counter() - start
        seconds: dict[bool, list[float]] = {True: [], False: []}
        figures = {}
        for _ in range(args.repeats):
            for reuse in seconds:
                runner.test_loop.prefix_reuse = reuse
                start = time.perf_counter()
                figures[reuse] = runner.test()
                seconds[reuse].append(time.perf_counter() - start)
    if figures[True] != figures[False]:
        raise AssertionError("prefix reuse has changed the figures")
    medians = {reuse: statistics.median(times) for reuse, times in seconds.items()}
    stitches = len(runner.model.backbone.space)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, widths {args.widths}, depths [12, 24]")
    print(f"{stitches} stitches, {args.images} images of {args.size} x {args.size}, medians of {args.repeats} runs")
    print(f"without prefix reuse {medians[False]:6.2f} s, with it {medians[True]:6.2f} s", end=", ")
    print(f"{medians[False] / medians[True]:.2f} times as fast; all {len(figures[True])} figures equal")
    print(f"FLOPs of all stitches counted in {counting:.2f} s")


if __name__ == "__main__":
    main()
