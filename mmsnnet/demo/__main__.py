"""Serves a page for one model on this machine: an image in, the result of any stitch out.

FOLDER is a model as ``tools/misc/publish_model.py ... --points FILE.json`` or ``tools/deployment/export.py`` writes it.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from mmsnnet.apis import Predictor
from mmsnnet.apis.images import list_images
from mmsnnet.cli.console import short_console
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.demo.page import build_page
from mmsnnet.demo.server import serve
from mmsnnet.models import find_stitched_backbone

MOST_EXAMPLES = 8


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m mmsnnet.demo", description=__doc__)
    parser.add_argument("folder", type=os.path.expanduser, metavar="FOLDER", help="a published model, or an export")
    parser.add_argument(
        "--points",
        type=os.path.expanduser,
        metavar="FILE.json",
        help="operating points of the model, to show those off the front too (default: FOLDER/front.json)",
    )
    parser.add_argument("--metric", help="compares stitches (default: the task's own)")
    parser.add_argument("--examples", type=os.path.expanduser, metavar="IMAGES", help="a folder of images to pick from")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to answer on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--max-upload-mb", type=float, default=20, metavar="MB", help="largest image file (default: %(default)s)"
    )
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if not args.max_upload_mb > 0:
        parser.error(f"--max-upload-mb is a positive number, got {args.max_upload_mb:g}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, which removes the uploads
    with tempfile.TemporaryDirectory(prefix="mmsnnet-demo-") as uploads, exit_on_user_error(parser), short_console():
        with user_errors(), redirect_stdout(io.StringIO()):  # toolboxes print that optional packages are missing
            examples = [] if args.examples is None else list(list_images(args.examples)[0])[:MOST_EXAMPLES]
            predictor = Predictor(args.folder, device=args.device, points=args.points)
            size = find_stitched_backbone(predictor.model).img_size
            predictor(np.zeros((*size, 3), np.uint8))  # the first call takes longer than others
            os.environ["GRADIO_TEMP_DIR"] = uploads
            title = Path(args.folder).resolve().name
            page = build_page(predictor, title, args.metric, [str(path) for path in examples])
        is_private = args.host in ("127.0.0.1", "::1", "localhost")
        notice = "" if is_private else "; everyone who reaches this address can use the page"

        def announce(url: str) -> None:
            print(f"{title}: {url} (Ctrl-C ends it{notice})", flush=True)

        serve(page, args.host, args.port, args.max_upload_mb, announce)


if __name__ == "__main__":
    main()
