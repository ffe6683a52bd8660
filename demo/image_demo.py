"""Predicts for images with a stitched model, and writes their pictures."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

import mmsnnet.safe_loading  # noqa: F401  mmengine then runs no code in checkpoints
from mmsnnet.apis import FailedImage
from mmsnnet.apis.images import list_images
from mmsnnet.apis.prediction import PICTURES, check_picture_name
from mmsnnet.cli.console import short_console
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.cli.prediction import add_model_arguments, build_predictor, check_outputs
from mmsnnet.files.writing import check_output


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=os.path.expanduser, help="image, folder of images, or pattern such as 'a/*.jpg'")
    add_model_arguments(parser)
    parser.add_argument(
        "--out",
        type=os.path.expanduser,
        required=True,
        metavar="OUT",
        help=f"file for one image ({', '.join(PICTURES)}); folder for several, with pictures of the images' paths",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images in a batch (default: 1)")
    return parser


def output_paths(images: Sequence[str], out: str, is_single: bool) -> list[Path]:
    """The file for each image: OUT itself, or in the folder OUT, its path below the folder that all have in common.

    The suffix becomes .png; images that differ by their suffixes alone keep them before it.
    """
    if is_single and not Path(out).is_dir():
        check_picture_name(out)
        return [Path(out)]
    paths = [Path(os.path.abspath(image)) for image in images]
    common = os.path.commonpath([path.parent for path in paths])
    relative = [path.relative_to(common) for path in paths]
    count = Counter(path.with_suffix("") for path in relative)
    return [
        Path(out, path.with_suffix(".png") if count[path.with_suffix("")] == 1 else f"{path}.png") for path in relative
    ]


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    console = Console(stderr=True)
    with exit_on_user_error(parser), short_console():
        with user_errors():
            listed, is_single = list_images(args.image)
            images = [str(image) for image in listed]
            paths = output_paths(images, args.out, is_single)
            check_outputs(images, paths)
            check_output(args.out, "--out", is_folder=paths != [Path(args.out)])
            predictor = build_predictor(args, batch_size=args.batch_size)
        results = zip(paths, predictor.stream(images), strict=True)
        failed = []
        for path, result in track(results, "predicting", len(images), console=console, disable=is_single):
            if isinstance(result, FailedImage):
                failed.append(result)
            else:
                with user_errors():
                    result.save(path)
                if is_single:
                    print(f"{path}: stitch {result.stitch}, {result.ms:.1f} ms")
        if is_single and failed:
            parser.error(failed[0].reason)
        if not is_single:
            print(f"{args.out}: {len(images) - len(failed)} of {len(images)} pictures")
    for failure in failed:
        print(f"error: {failure.reason}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
