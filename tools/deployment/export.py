"""Exports stitches of a trained model to ONNX or torch.export, with one file of weights for all ONNX graphs."""

import argparse
import os
from pathlib import Path

from rich.console import Console

import mmsnnet.safe_loading  # noqa: F401  mmengine then runs no code in checkpoints
from mmsnnet.apis import ExportSettings, export_stitches, load_config
from mmsnnet.apis.publish import FRONT
from mmsnnet.cli.arguments import add_config_arguments
from mmsnnet.cli.console import import_toolbox, short_console
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.deployment.exporter import FORMATS
from mmsnnet.deployment.manifest import ExportedStitch


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser, "config file of the whole model")
    parser.add_argument(
        "checkpoint", type=os.path.expanduser, help="its checkpoint: a file, folder, URL or hf-hub:owner/name"
    )
    parser.add_argument(
        "stitches", metavar="STITCHES", help="ids and names, such as 57,S4-L10; front (see --points); anchors; or all"
    )
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=os.path.expanduser,
        required=True,
        metavar="DIR",
        help="folder to make; it must not exist, or be empty",
    )
    parser.add_argument(
        "--points",
        type=os.path.expanduser,
        metavar="FILE.json",
        help="the model's operating points, for STITCHES front and the manifest (default: those in the folder "
        "CHECKPOINT)",
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--precision", choices=("fp32", "fp16"), default="fp32", help="of the weights (default: %(default)s)"
    )
    precision.add_argument(
        "--quantize",
        choices=("int8",),
        help="quantise matrix products with weights to 8-bit integers, for CPUs; ranges of activations are computed in "
        "each run, or see --calibration-images",
    )
    parser.add_argument(
        "--calibration-images", type=int, metavar="N", help="fix the ranges of activations on N images of --images"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="height and width of the images (default: the window of slide inference, or the backbone's img_size)",
    )
    parser.add_argument("--dynamic-size", action="store_true", help="let the graphs take images of any size")
    parser.add_argument(
        "--images",
        type=os.path.expanduser,
        metavar="PATH",
        help="images on which each export is compared with PyTorch (default: the first of the test set)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest difference from PyTorch, as a share of the largest output (1e-4; fp16: 0.02; int8: 0.25)",
    )
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    console = Console(stderr=True)
    with exit_on_user_error(parser), user_errors(), short_console():
        config = load_config(args.config, args.cfg_options)
        import_toolbox(config)
        published = Path(args.checkpoint) / FRONT
        points = args.points or (published if published.is_file() else None)
        settings = ExportSettings(
            format=args.format,
            precision=args.quantize or args.precision,
            calibration_images=args.calibration_images,
            image_size=None if args.size is None else tuple(args.size),
            dynamic_size=args.dynamic_size,
            tolerance=args.tolerance,
        )

        def report(stitch: ExportedStitch) -> None:
            classes = "" if stitch.agreement is None else f", {stitch.agreement:.3%} of the classes equal"
            console.print(f"{stitch.file}: difference {stitch.difference:.1e}{classes}", highlight=False)

        export_stitches(
            config, args.checkpoint, args.stitches, args.out, settings, points=points, images=args.images, done=report
        )
    sizes = sum(file.stat().st_size for file in Path(args.out).iterdir())
    print(f"{args.out}: {sizes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
