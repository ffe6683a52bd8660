"""Counts FLOPs (multiply-accumulates) and parameters of every stitch of a model, without weights or images."""

import argparse
import os
import time

from mmsnnet.apis import build_uninitialized, count_stitches, load_config
from mmsnnet.apis.model import check_channels
from mmsnnet.cli.arguments import add_config_arguments
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.files.writing import check_output
from mmsnnet.models import find_stitched_backbone
from mmsnnet.visualization import operating_points_table, print_table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--shape", nargs=2, type=int, metavar=("H", "W"), help="input size (default: the backbone's img_size)"
    )
    parser.add_argument(
        "--out", type=os.path.expanduser, metavar="FILE.json", help="write the counts as a file of operating points"
    )
    return parser


def count(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.cfg_options)
    if args.out:
        check_output(args.out, "--out")
    model = build_uninitialized(config)
    check_channels(config, model)
    start = time.monotonic()
    points = count_stitches(config, model, args.shape)
    seconds = time.monotonic() - start
    print_table(operating_points_table(points))
    flops = [point.flops for point in points]
    total = sum(parameter.numel() for parameter in find_stitched_backbone(model).parameters())
    print(
        f"{len(points)} stitches, {min(flops) / 1e9:.4g} to {max(flops) / 1e9:.4g} GFLOPs at {points.input_shape}, "
        f"counted in {seconds:.1f} s; backbone: {total / 1e6:.2f} M parameters"
    )
    if args.out:
        points.save(args.out)
        print(f"written to {args.out}")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_user_error(parser), user_errors():
        count(args)


if __name__ == "__main__":
    main()
