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
from mmsnnet.cli.arguments import DictAction
from mmsnnet.cli.errors import mistakes_answered
from mmsnnet.models import find_stitched_backbone
from mmsnnet.visualization import plot_routes


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described.add_argument("config", type=os.path.expanduser, help="config file")
    described.add_argument(
        "stitches", metavar="STITCH[,STITCH...]", help="ids and names, such as 57,80 or S4-L10; or anchors; or all"
    )
    described.add_argument(
        "--out", type=os.path.expanduser, required=True, metavar="FILE.png", help="the picture: .png or .svg"
    )
    described.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings of the config"
    )
    return described


def main(argv: Sequence[str] | None = None) -> None:
    command = parser()
    args = command.parse_args(argv)
    with mistakes_answered(command):
        config = load_config(args.config, args.cfg_options)
        backbone = find_stitched_backbone(build_without_weights(config))
        taps = () if backbone.num_classes is not None else backbone.test_out_indices
        print(plot_routes(backbone.space, args.stitches, args.out, taps))


if __name__ == "__main__":
    main()
