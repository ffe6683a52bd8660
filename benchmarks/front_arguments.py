"""The command line of benchmarks/front.py."""

import argparse
from pathlib import Path

from front_recipes import REGIMES


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The parser of all arguments; it refuses values that would fail only after training."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--regime", choices=REGIMES, default="shapes")
    parser.add_argument("--recipes", type=_names, help="names, separated by commas (default: all of the regime)")
    parser.add_argument("--seeds", type=_seeds, default="0,1,2")
    parser.add_argument("--jobs", type=_jobs, default=1, help="runs at the same time, each on one thread")
    parser.add_argument("--quick", action="store_true", help="a comparison of minutes, without meaning")
    parser.add_argument("--folder", type=Path, default=Path("work_dirs/front"))
    parser.add_argument("--out", type=Path, help="the file of results (default: benchmarks/front_results/REGIME.json)")
    parser.add_argument("--picture", type=_picture)
    return parser


def _names(text: str) -> list[str]:
    """Names without repetition, in order."""
    return list(dict.fromkeys(text.split(",")))


def _seeds(text: str) -> list[int]:
    """Seeds without repetition, in order."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers from 0 to 2**32 - 1, as in 0,1,2")
    return list(dict.fromkeys(map(int, parts)))


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def _picture(text: str) -> Path:
    """A path that Matplotlib can write to."""
    from matplotlib.backend_bases import FigureCanvasBase

    path, formats = Path(text), FigureCanvasBase.get_supported_filetypes()
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {str(path.parent)!r}: create it, or name another file")
    if path.suffix[1:].lower() not in formats:
        raise argparse.ArgumentTypeError(f"{text!r}: end the name in .png or another of {', '.join(sorted(formats))}")
    return path
