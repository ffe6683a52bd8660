"""Converts a checkpoint that SN-Netv2 released, for segmentation or classification, into one of mmsnnet's, or back."""

import argparse

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmsnnet.cli.errors import mistakes_answered
from mmsnnet.converters import convert_snnetv2
from mmsnnet.converters.snnetv2 import Conversion
from mmsnnet.visualization import print_table


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(description=__doc__)
    described.add_argument("source", metavar="SRC", help="checkpoint to read")
    described.add_argument("target", metavar="DST", help="checkpoint to write: .safetensors, or .pth")
    described.add_argument("--reverse", action="store_true", help="from mmsnnet's names to the released ones")
    described.add_argument(
        "--merged",
        action="store_true",
        help="SRC was saved in evaluation mode, its low-rank updates merged into the weights: take them out again",
    )
    described.add_argument("--config", metavar="CONFIG", help="config whose model the weights must fit")
    return described


def mapping_table(conversion: Conversion) -> Table:
    """One row for each pair of patterns, then what was dropped and what was made."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("from", overflow="fold")
    table.add_column("to", overflow="fold")
    table.add_column("tensors", justify="right", no_wrap=True)
    rows = [(*patterns, count) for patterns, count in conversion.mapped.items()]
    rows += [(pattern, "(dropped)", count) for pattern, count in conversion.dropped.items()]
    rows += [("(made)", pattern, count) for pattern, count in conversion.made.items()]
    for source, target, count in rows:
        table.add_row(Text(source), Text(target), str(count))
    return table


def main() -> None:
    command = parser()
    args = command.parse_args()
    with mistakes_answered(command):
        conversion = convert_snnetv2(args.source, args.target, args.reverse, args.merged, args.config)
    print_table(mapping_table(conversion))
    if conversion.unmerged:
        print(f"low-rank updates taken out of the weights of {conversion.unmerged} stitching layers")
    print(conversion.structure)
    print(f"written to {args.target}")


if __name__ == "__main__":
    main()
