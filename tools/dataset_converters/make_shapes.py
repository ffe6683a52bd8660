"""Writes a procedural set of shapes in the folders and file names of a real set, to try configs without a download."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from mmsnnet.datasets import CLASSES, LAYOUTS, MIN_SIDE, write_shapes


def parser() -> argparse.ArgumentParser:
    from_one = [name for name, layout in LAYOUTS.items() if layout.first_label == 1]
    described = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"The {len(CLASSES)} classes: {', '.join(CLASSES)}. "
        f"Labels on disk start from 1 (read them with reduce_zero_label=True) in: {', '.join(from_one)}; else from 0.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    described.add_argument("out", metavar="OUT", help="the folder to make; may exist only if it is empty")
    described.add_argument(
        "--layout", required=True, metavar="LAYOUT", help=f"whose folders and file names: {', '.join(LAYOUTS)}"
    )
    described.add_argument("--train", type=int, default=200, metavar="N", help="images to train on")
    described.add_argument("--val", type=int, default=50, metavar="N", help="images to validate on")
    described.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(128, 128),
        metavar=("H", "W"),
        help=f"height and width in pixels, each at least {MIN_SIDE}",
    )
    described.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed gives the same images, however many are made"
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
                size=tuple(args.size),
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
