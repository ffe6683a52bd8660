"""Draws the routes of stitches through the blocks of a config's anchors.

Example:
    python tools/analysis_tools/plot_route.py CONFIG L5-S3-L12,57 --out routes.png
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from mmsnnet.apis import load_config
from mmsnnet.apis.model import build_without_weights
from mmsnnet.cli.arguments import add_config_arguments
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.models import find_stitched_backbone
from mmsnnet.visualization import plot_routes


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        "stitches", metavar="STITCH[,STITCH...]", help="ids and names, such as 57,80 or S4-L10; or anchors; or all"
    )
    parser.add_argument(
        "--out", type=os.path.expanduser, required=True, metavar="FILE.png", help="the picture: .png or .svg"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with exit_on_user_error(parser), user_errors():
        config = load_config(args.config, args.cfg_options)
        backbone = find_stitched_backbone(build_without_weights(config))
        taps = () if backbone.num_classes is not None else backbone.test_out_indices
        print(plot_routes(backbone.space, args.stitches, args.out, taps))


if __name__ == "__main__":
    main()
