"""Extracts one stitch from a trained model: a folder with the weights that it uses, and its config."""

import argparse
import os

from mmsnnet.apis import extract_stitch, load_config
from mmsnnet.cli.arguments import add_config_arguments
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.datasets import check_folders


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser, "config file of the whole model")
    parser.add_argument(
        "checkpoint", type=os.path.expanduser, help="its checkpoint: a file, folder, URL or hf-hub:owner/name"
    )
    parser.add_argument("stitch", metavar="STITCH", help="id or name of the stitch, such as 57 or S4-L10")
    parser.add_argument(
        "--out",
        type=os.path.expanduser,
        required=True,
        metavar="DIR",
        help="folder to make; it must not exist, or be empty",
    )
    parser.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="recompute the running statistics of batch norms over N training images (default: the checkpoint's)",
    )
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_user_error(parser), user_errors():
        config = load_config(args.config, args.cfg_options)
        if args.recalibrate is not None:
            check_folders(config, ("train_dataloader",))
        extracted = extract_stitch(config, args.checkpoint, args.stitch, args.out, args.recalibrate)
    if os.path.isfile(args.checkpoint):
        print(f"{args.checkpoint}: {os.path.getsize(args.checkpoint) / 1e6:.2f} MB")
    print(f"{extracted.weights}: {extracted.size / 1e6:.2f} MB, sha256 {extracted.sha256}")


if __name__ == "__main__":
    main()
