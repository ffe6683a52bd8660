"""Converts a released SN-Netv2 checkpoint, for segmentation or classification, to mmsnnet's names."""

import argparse

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.converters import convert_snnetv2
from mmsnnet.converters.snnetv2 import Conversion
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


def mapping_table(conversion: Conversion) -> Table:
    """One row for each pair of patterns, then dropped and added tensors."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("from", overflow="fold")
    table.add_column("to", overflow="fold")
    table.add_column("tensors", justify="right", no_wrap=True)
    rows = [(*patterns, count) for patterns, count in conversion.mapped.items()]
    rows += [(pattern, "(dropped)", count) for pattern, count in conversion.dropped.items()]
    rows += [("(added)", pattern, count) for pattern, count in conversion.added.items()]
    for source, target, count in rows:
        table.add_row(Text(source), Text(target), str(count))
    return table


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_user_error(parser), user_errors():
        conversion = convert_snnetv2(args.source, args.target, args.merged, args.config)
    print_table(mapping_table(conversion))
    if conversion.unmerged:
        print(f"low-rank updates subtracted from the weights of {conversion.unmerged} stitching layers")
    print(conversion.structure)
    print(f"written to {args.target}")


if __name__ == "__main__":
    main()
