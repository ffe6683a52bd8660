"""Cuts one stitch out of a trained model: a checkpoint of the weights that it uses, and a config, in a folder."""

import argparse
import os

from mmsnnet.apis import extract_stitch, load_config
from mmsnnet.cli.arguments import DictAction
from mmsnnet.cli.errors import mistakes_answered


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(description=__doc__)
    described.add_argument("config", type=os.path.expanduser, help="config file of the whole model")
    described.add_argument(
        "checkpoint", type=os.path.expanduser, help="its checkpoint: a file, folder, URL or hf-hub:owner/name"
    )
    described.add_argument("stitch", metavar="STITCH", help="id or name of the stitch, such as 57 or S4-L10")
    described.add_argument(
        "--out",
        type=os.path.expanduser,
        required=True,
        metavar="DIR",
        help="folder to make; it must not exist, or be empty",
    )
    described.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings of the config"
    )
    return described


def main() -> None:
    command = parser()
    args = command.parse_args()
    with mistakes_answered(command):
        config = load_config(args.config, args.cfg_options)
        extracted = extract_stitch(config, args.checkpoint, args.stitch, args.out)
    if os.path.isfile(args.checkpoint):
        print(f"{args.checkpoint}: {os.path.getsize(args.checkpoint) / 1e6:.2f} MB")
    print(f"{extracted.weights}: {extracted.size / 1e6:.2f} MB, sha256 {extracted.sha256}")


if __name__ == "__main__":
    main()
