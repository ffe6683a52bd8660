"""Counts FLOPs (multiply-accumulates) and parameters of a stitched model at every stitch, without running them."""

import argparse
import os
import time

from mmsnnet.apis import build_uninitialized, load_config
from mmsnnet.apis.model import check_channels
from mmsnnet.cli.arguments import DictAction
from mmsnnet.cli.errors import mistakes_answered
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.models import find_stitched_backbone, model_costs
from mmsnnet.visualization import operating_points_table, print_table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=os.path.expanduser, help="config file")
    parser.add_argument(
        "--shape", nargs=2, type=int, metavar=("H", "W"), help="input size (default: the backbone's img_size)"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings of the config"
    )
    parser.add_argument(
        "--out", type=os.path.expanduser, metavar="FILE.json", help="write the counts as a file of operating points"
    )
    args = parser.parse_args()
    with mistakes_answered(parser):
        args.config = load_config(args.config, args.cfg_options)
        args.model = build_uninitialized(args.config)
        check_channels(args.config, args.model)
        args.backbone = find_stitched_backbone(args.model)
    return args


def main() -> None:
    args = parse_args()
    backbone = args.backbone
    start = time.monotonic()
    costs = model_costs(args.model, args.shape and tuple(args.shape))
    seconds = time.monotonic() - start
    points = OperatingPoints(
        config=str(args.config.filename),
        checkpoint=None,
        dataset=None,
        input_shape=tuple(args.shape or backbone.img_size),
        device=None,
        points=tuple(
            OperatingPoint(stitch.id, stitch.name, stitch.kind, costs[stitch.id].flops, costs[stitch.id].params)
            for stitch in backbone.space
        ),
        depths=backbone.space.depths,
    )
    print_table(operating_points_table(points))
    total = sum(parameter.numel() for parameter in backbone.parameters())
    print(
        f"{len(points)} stitches, {min(c.flops for c in costs.values()) / 1e9:.4g} to "
        f"{max(c.flops for c in costs.values()) / 1e9:.4g} GFLOPs at {points.input_shape}, counted in {seconds:.1f} s; "
        f"backbone: {total / 1e6:.2f} M parameters"
    )
    if args.out:
        points.save(args.out)
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
