"""Converts a released SN-Netv2 checkpoint, for segmentation or classification, to mmsnnet's names."""

import argparse

from mmsnnet.cli.conversion_table import conversion_table
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.converters import convert_snnetv2
from mmsnnet.visualization import print_table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="SRC", help="checkpoint to read")
    parser.add_argument("target", metavar="DST", help="checkpoint to write: .safetensors, or .pth")
    parser.add_argument(
        "--merged",
        action="store_true",
        help="SRC was saved in evaluation mode, with low-rank updates merged into the weights: subtract them",
    )
    parser.add_argument("--config", metavar="CONFIG", help="config whose model the weights must fit")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_user_error(parser), user_errors():
        conversion = convert_snnetv2(args.source, args.target, args.merged, args.config)
    print_table(conversion_table(conversion))
    if conversion.unmerged:
        print(f"low-rank updates subtracted from the weights of {conversion.unmerged} stitching layers")
    print(conversion.structure)
    print(f"written to {args.target}")


if __name__ == "__main__":
    main()
