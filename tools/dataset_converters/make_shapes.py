"""Writes a procedural data set with the folders and file names of a real one, to try configs without a download."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmsnnet.datasets import LAYOUTS, MIN_SIDE, write_shapes
from mmsnnet.errors import UserError, needs_extra


def make_parser() -> argparse.ArgumentParser:
    layouts = "\n".join(f"  {name:<14} {layout.summary}" for name, layout in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"layouts:\n{layouts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", help="folder to make; it must not exist, or be empty")
    parser.add_argument("--layout", required=True, metavar="LAYOUT", help="of folders and file names, see below")
    parser.add_argument("--train", type=int, default=200, metavar="N", help="images to train on (default: 200)")
    parser.add_argument("--val", type=int, default=50, metavar="N", help="images to validate on (default: 50)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help=f"height and width in pixels, each at least {MIN_SIDE} (default: 128 128; nyu: 480 640)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="image i depends on the seed, the split and i only (default: 0)",
    )
    return parser


@needs_extra("viz")
def write(args: argparse.Namespace) -> Path:
    """Write the set with a progress bar; return its folder."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Images", total=args.train + args.val)
        return write_shapes(
            args.out,
            args.layout,
            train=args.train,
            val=args.val,
            size=args.size and tuple(args.size),
            seed=args.seed,
            on_image=lambda: progress.advance(task),
        )


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        out = write(args)
    except (UserError, ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
    print(f"Wrote {args.train} training and {args.val} validation images in the {args.layout} layout to {out}")


if __name__ == "__main__":
    main()
