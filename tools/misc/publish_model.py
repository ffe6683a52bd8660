"""Publishes a trained model: weights, config and a model card in a folder, as the Hugging Face hub has them."""

import argparse
import os

from mmsnnet.apis import load_config, publish_model
from mmsnnet.cli.arguments import DictAction
from mmsnnet.cli.errors import mistakes_answered


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(description=__doc__)
    described.add_argument("config", type=os.path.expanduser, help="config file")
    described.add_argument(
        "checkpoint", type=os.path.expanduser, help="its checkpoint: a file, folder, URL or hf-hub:owner/name"
    )
    described.add_argument(
        "out", type=os.path.expanduser, metavar="OUT", help="folder to make; it must not exist, or be empty"
    )
    described.add_argument(
        "--points",
        type=os.path.expanduser,
        metavar="FILE.json",
        help="what tools/test.py --out wrote: its Pareto front goes with the model, for StitchedViT's budget",
    )
    described.add_argument("--metric", help="metric of that front (default: the task's own)")
    described.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings of the config"
    )
    return described


def main() -> None:
    command = parser()
    args = command.parse_args()
    with mistakes_answered(command):
        config = load_config(args.config, args.cfg_options)
        published = publish_model(config, args.checkpoint, args.out, args.points, args.metric)
    if os.path.isfile(args.checkpoint):
        print(f"{args.checkpoint}: {os.path.getsize(args.checkpoint) / 1e6:.2f} MB")
    print(f"{published.weights}: {published.size / 1e6:.2f} MB, sha256 {published.sha256}")


if __name__ == "__main__":
    main()
