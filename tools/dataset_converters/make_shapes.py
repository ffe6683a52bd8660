"""Writes a procedural set in the folders and file names of a real set, to try configs without a download."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from mmsnnet.datasets import LAYOUTS, MIN_SIDE, write_shapes


def parser() -> argparse.ArgumentParser:
    layouts = "\n".join(f"  {name:<14} {layout.summary}" for name, layout in LAYOUTS.items())
    described = argparse.ArgumentParser(
        description=__doc__, epilog=f"layouts:\n{layouts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described.add_argument("out", metavar="OUT", help="the folder to make; may exist only if it is empty")
    described.add_argument("--layout", required=True, metavar="LAYOUT", help="whose folders and file names: see below")
    described.add_argument("--train", type=int, default=200, metavar="N", help="images to train on (default: 200)")
    described.add_argument("--val", type=int, default=50, metavar="N", help="images to validate on (default: 50)")
    described.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help=f"height and width in pixels, each at least {MIN_SIDE} (default: 128 128; nyu: 480 640)",
    )
    described.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="the same seed gives the same images, however many are made (default: 0)",
    )
    return described


def main() -> None:
    command = parser()
    args = command.parse_args()
    try:
        with Progress(
            *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True), transient=True
        ) as progress:
            task = progress.add_task("Images", total=args.train + args.val)
            out = write_shapes(
                args.out,
                args.layout,
                train=args.train,
                val=args.val,
                size=args.size and tuple(args.size),
                seed=args.seed,
                on_image=lambda: progress.advance(task),
            )
    except (ValueError, OSError) as mistake:
        command.error(str(mistake))
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
    print(f"Wrote {args.train} training and {args.val} validation images in the {args.layout} layout to {out}")


if __name__ == "__main__":
    main()
