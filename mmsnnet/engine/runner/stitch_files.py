"""A folder for each stitch, into which metrics and hooks write while several stitches are evaluated."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.visualization import Visualizer

from mmsnnet.engine.attributes import replaced_attributes
from mmsnnet.engine.mmengine_private import drawn_images, image_folders, set_drawn_images, visualizer_of
from mmsnnet.files.writing import check_output

# Attributes of metrics that hold the path of results: IoUMetric.output_dir, DumpResults.out_file_path,
# CocoMetric.outfile_prefix, CocoPanopticMetric.seg_out_dir, DumpProposals.proposals_file, and names like them.
# Paths of inputs (ann_file, img_prefix, gt_dir) and of files that ranks exchange (collect_dir) do not match.
OUTPUT = re.compile(
    r"_?(\w+_)?(out|output|outputs|save|saved|dump|results?|submissions?|preds?|predictions?|proposals)_?(file_?)?"
    r"(dir|folder|root|path|file|filename|prefix)"
)
FOLDER = re.compile(r"\w*(dir|folder|root)")


def output_paths(metric: BaseMetric, folder: str) -> dict[str, str]:
    """Paths of a metric's results inside ``folder``, by the name of the attribute.

    ``masks/`` becomes ``masks/<folder>/``; ``dir/name.pkl`` becomes ``dir/<folder>/name.pkl``.
    """
    return {name: os.path.join(parent, folder, *filter(None, [file])) for name, parent, file in _outputs(metric)}


def make_folders(metric: BaseMetric, folder: str = "") -> None:
    """Create the folders of :func:`output_paths`, and try to write. Other storage, such as ``s3://``, has none."""
    for name, parent, file in _outputs(metric):
        if "://" not in parent:
            path, is_file = os.path.join(parent, folder, file), bool(file) and _names_file(name)
            option = f"{type(metric).__name__}.{name}"
            check_output(path if is_file else os.path.dirname(path) or ".", option, is_folder=not is_file)


def _outputs(metric: BaseMetric) -> Iterator[tuple[str, str, str]]:
    """Attributes that are paths of results: (name, folder, name of the file or nothing)."""
    for name, value in vars(metric).items():
        if not OUTPUT.fullmatch(name) or not isinstance(value, str | os.PathLike) or not os.fspath(value):
            continue
        path = os.fspath(value)
        is_folder = FOLDER.fullmatch(name) or (os.path.isdir(path) and not _names_file(name))
        yield name, *((path, "") if is_folder else os.path.split(path))


def _names_file(name: str) -> bool:
    return "file" in name and not name.endswith("prefix")


class StitchPictures:
    """Put the pictures that hooks draw (``SegVisualizationHook``, ``DetVisualizationHook``) into a folder per stitch.

    Args:
        hooks: of the runner.
        visualizer: of the runner.
        folders: one name for each stitch.
    """

    def __init__(self, hooks: Sequence[Hook], visualizer: Visualizer, folders: Sequence[str]) -> None:
        drawing = [hook for hook in hooks if visualizer_of(hook) is not None]
        self._visualizers = list(dict.fromkeys([visualizer, *map(visualizer_of, drawing)]))
        self._counting = [hook for hook in drawing if drawn_images(hook) is not None]
        self._counts = {folder: list(map(drawn_images, self._counting)) for folder in folders}

    @contextmanager
    def of(self, folder: str) -> Iterator[None]:
        """Draw for one stitch.

        Visualizers put the folder before the name of a picture and into the path of ``out_file``. Hooks that number
        their pictures continue with the number of this stitch.
        """
        for hook, count in zip(self._counting, self._counts[folder], strict=True):
            set_drawn_images(hook, count)
        methods = [(visualizer, "add_image", _add_image_in(visualizer, folder)) for visualizer in self._visualizers]
        for visualizer in self._visualizers:
            if hasattr(visualizer, "add_datasample"):
                methods.append((visualizer, "add_datasample", _add_datasample_in(visualizer, folder)))
        with replaced_attributes(methods):
            yield
        self._counts[folder] = list(map(drawn_images, self._counting))


def _add_image_in(visualizer: Visualizer, folder: str) -> Callable[..., Any]:
    add_image = visualizer.add_image

    def add(name: str, *args: Any, **kwargs: Any) -> Any:
        if is_main_process():
            for images in image_folders(visualizer):
                os.makedirs(os.path.dirname(os.path.join(images, folder, name)), exist_ok=True)
        return add_image(f"{folder}/{name}", *args, **kwargs)

    return add


def _add_datasample_in(visualizer: Visualizer, folder: str) -> Callable[..., Any]:
    add_datasample = visualizer.add_datasample
    signature = inspect.signature(add_datasample)

    def add(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        if call.arguments.get("out_file") is not None:
            path = Path(call.arguments["out_file"])
            call.arguments["out_file"] = str(path.parent / folder / path.name)
        return add_datasample(*call.args, **call.kwargs)

    return add
