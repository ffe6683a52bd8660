"""Writing figures of matplotlib to files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from mmsnnet.files.writing import check_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_picture(out: Path, *suffixes: str) -> None:
    """Raise ValueError unless a file's name ends in one of ``suffixes``, OSError unless it can be written."""
    if out.suffix.lower() not in suffixes:
        *first, last = suffixes
        raise ValueError(
            f"{out}: expected a name that ends in {', '.join(first)} or {last}, found {out.suffix or 'no suffix'!r}"
        )
    check_output(out)


def render(figure: Figure, out: Path) -> bytes:
    """Render a figure as the bytes of a PNG or SVG file, chosen by the suffix of ``out``.

    The same figure gives the same bytes. The canvas is separate from pyplot, whose state and settings stay unchanged.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    if out.suffix.lower() == ".png":
        FigureCanvasAgg(figure).print_png(buffer)
    else:
        # Without a salt, ids in the SVG are random.
        with rc_context({"svg.hashsalt": "mmsnnet"}):
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()
