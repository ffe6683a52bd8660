"""Predicts for a video with a stitched model, at a frame rate that is kept, and writes the frames' pictures."""

import argparse
import os
import sys
from contextlib import closing

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import mmsnnet.safe_loading  # noqa: F401  mmengine then runs no code in checkpoints
from mmsnnet.apis.video import VIDEOS, Video, predict_video, video_writer
from mmsnnet.cli.console import short_console
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.cli.prediction import add_model_arguments, build_predictor, check_outputs
from mmsnnet.errors import DataError, SettingError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", type=os.path.expanduser, help="video file, or the number of a camera")
    add_model_arguments(parser)
    parser.add_argument(
        "--out", type=os.path.expanduser, required=True, metavar="OUT", help=f"video to write ({', '.join(VIDEOS)})"
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="X",
        help="frames per second to process: the stitch moves along the front, within the budget if there is one",
    )
    parser.add_argument(
        "--max-frames",
        type=int,
        metavar="N",
        help="end after N frames (default: at the end of the file; a camera also ends by Ctrl-C)",
    )
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    budget = dict(max_gflops=args.max_gflops, max_latency_ms=args.max_latency_ms)
    with exit_on_user_error(parser), short_console(), user_errors():
        if args.fps is not None and args.stitch is not None:
            raise SettingError("--fps moves among stitches, and --stitch fixes one: give one of them")
        if args.max_frames is not None and args.max_frames < 1:
            raise SettingError(f"--max-frames is a number of at least 1, got {args.max_frames}")
        check_outputs([args.video], [args.out])
        video = Video(int(args.video) if args.video.isdecimal() else args.video)
        # The stitch of the budget is chosen below: with --fps, the budget is a bound.
        predictor = build_predictor(args, max_gflops=None, max_latency_ms=None)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        written, failure = 0, None
        with (
            video_writer(args.out, video.fps or args.fps or 25) as write,
            closing(predict_video(predictor, video, args.fps, **budget)) as frames,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            bar = progress.add_task("frames", total=args.max_frames or video.length)
            try:
                for frame in frames:
                    write(frame.picture())
                    written += 1
                    if frame.changed:
                        progress.console.print(f"frame {frame.number}: {frame.text()}", highlight=False)
                    progress.update(bar, advance=1, description=frame.text())
                    if written == args.max_frames:
                        break
            except KeyboardInterrupt:
                if not video.is_camera or not written:
                    raise
            except DataError as error:  # the file is cut short: the frames before are kept
                if not written:
                    raise
                failure = error
    print(f"{args.out}: {written} frames")
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
