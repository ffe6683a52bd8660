"""Publishes a trained model: a folder with weights, config and model card, in the Hugging Face hub's layout."""

import argparse
import os

from mmsnnet.apis import load_config, publish_model
from mmsnnet.cli.arguments import add_config_arguments
from mmsnnet.cli.console import short_console
from mmsnnet.cli.errors import exit_on_user_error, user_errors


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "checkpoint", type=os.path.expanduser, help="its checkpoint: a file, folder, URL or hf-hub:owner/name"
    )
    parser.add_argument(
        "out", type=os.path.expanduser, metavar="OUT", help="folder to make; it must not exist, or be empty"
    )
    parser.add_argument(
        "--points",
        type=os.path.expanduser,
        metavar="FILE.json",
        help="a file of tools/test.py: its Pareto front is published too, for StitchedBackbone.set_budget",
    )
    parser.add_argument("--metric", help="metric of that front (default: the task's own)")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_user_error(parser), user_errors(), short_console():
        config = load_config(args.config, args.cfg_options)
        published = publish_model(config, args.checkpoint, args.out, args.points, args.metric)
    if os.path.isfile(args.checkpoint):
        print(f"{args.checkpoint}: {os.path.getsize(args.checkpoint) / 1e6:.2f} MB")
    print(f"{published.weights}: {published.size / 1e6:.2f} MB, sha256 {published.sha256}")


if __name__ == "__main__":
    main()
