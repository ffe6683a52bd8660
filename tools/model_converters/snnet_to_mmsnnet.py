"""Converts a released SN-Net checkpoint, of one of the five published families, to mmsnnet's names."""

import argparse

from mmsnnet.cli.conversion_table import conversion_table
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.converters import convert_snnet
from mmsnnet.converters.snnet import FAMILIES
from mmsnnet.visualization import print_table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="SRC", help="checkpoint to read")
    parser.add_argument("target", metavar="DST", help="checkpoint to write: .safetensors, or .pth")
    parser.add_argument("--family", required=True, choices=FAMILIES, help="anchors of the checkpoint")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_user_error(parser), user_errors():
        conversion = convert_snnet(args.source, args.target, args.family)
    print_table(conversion_table(conversion))
    if conversion.unused:
        print(f"left out, because no route crosses them: {', '.join(conversion.unused)}")
    print(f"written to {args.target}")


if __name__ == "__main__":
    main()
