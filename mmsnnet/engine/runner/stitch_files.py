"""A folder for each stitch: what metrics and hooks write while several stitches are evaluated."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend, Visualizer

# Attributes of metrics that say where results go: IoUMetric.output_dir, DumpResults.out_file_path,
# CocoMetric.outfile_prefix, CocoPanopticMetric.seg_out_dir, DumpProposals.proposals_file, and names like them.
# Those of inputs (ann_file, img_prefix, gt_dir) and of what ranks exchange (collect_dir) do not match.
OUTPUT = re.compile(
    r"_?(\w+_)?(out|output|outputs|save|saved|dump|results?|submissions?|preds?|predictions?|proposals)_?(file_?)?"
    r"(dir|folder|root|path|file|filename|prefix)"
)
FOLDER = re.compile(r"\w*(dir|folder|root)")


def output_paths(metric: BaseMetric, folder: str) -> dict[str, str]:
    """The attributes of a metric that are paths of its results, with paths inside ``folder`` beside the given ones:
    ``masks/`` becomes ``masks/<folder>/``, ``dir/name.pkl`` becomes ``dir/<folder>/name.pkl``."""
    return {name: os.path.join(parent, folder, *filter(None, [file])) for name, parent, file in _outputs(metric)}


def make_folders(metric: BaseMetric, folder: str) -> None:
    """Creates the folders that :func:`output_paths` leads to. Other kinds of storage, as ``s3://``, need none."""
    for _, parent, _ in _outputs(metric):
        if "://" not in parent:
            os.makedirs(os.path.join(parent, folder), exist_ok=True)


def _outputs(metric: BaseMetric) -> Iterator[tuple[str, str, str]]:
    """Attributes that are paths of results: name, folder, and name of the file or empty."""
    for name, value in vars(metric).items():
        if not OUTPUT.fullmatch(name) or not isinstance(value, str | os.PathLike) or not os.fspath(value):
            continue
        path = os.fspath(value)
        is_folder = FOLDER.fullmatch(name) or os.path.isdir(path)
        yield name, *((path, "") if is_folder else os.path.split(path))


class StitchPictures:
    """Gives the pictures that hooks draw (``SegVisualizationHook``, ``DetVisualizationHook``) a folder per stitch.

    Inside :meth:`of`, visualizers put the stitch's name before that of a picture, and into the path of ``out_file``;
    hooks that count the images they have seen (``_test_index``) count those of the stitch. Nothing stays changed.

    Args:
        runner: with its hooks and its visualizer.
        folders: of all stitches.
    """

    def __init__(self, runner: Runner, folders: Sequence[str]) -> None:
        drawing = [hook for hook in runner.hooks if isinstance(getattr(hook, "_visualizer", None), Visualizer)]
        visualizers = [runner.visualizer, *(hook._visualizer for hook in drawing)]
        self._visualizers = list({id(visualizer): visualizer for visualizer in visualizers}.values())
        self._counting = [hook for hook in drawing if isinstance(getattr(hook, "_test_index", None), int)]
        self._seen = {folder: [hook._test_index for hook in self._counting] for folder in folders}

    @contextmanager
    def of(self, folder: str) -> Iterator[None]:
        """Draws for one stitch."""
        for hook, seen in zip(self._counting, self._seen[folder], strict=True):
            hook._test_index = seen
        with ExitStack() as stack:
            for visualizer in self._visualizers:
                stack.enter_context(_replaced(visualizer, "add_image", _into_folder(visualizer, folder)))
                if hasattr(visualizer, "add_datasample"):
                    drawing = _with_out_file(visualizer.add_datasample, folder)
                    stack.enter_context(_replaced(visualizer, "add_datasample", drawing))
            yield
        self._seen[folder] = [hook._test_index for hook in self._counting]


def _into_folder(visualizer: Visualizer, folder: str) -> Callable[..., Any]:
    add_image = visualizer.add_image

    def add(name: str, *args: Any, **kwargs: Any) -> Any:
        if is_main_process():
            for backend in visualizer._vis_backends.values():
                if isinstance(backend, LocalVisBackend):  # OpenCV does not create folders, and does not say so
                    file = os.path.join(backend.experiment._img_save_dir, folder, name)
                    os.makedirs(os.path.dirname(file), exist_ok=True)
        return add_image(f"{folder}/{name}", *args, **kwargs)

    return add


def _with_out_file(add_datasample: Callable[..., Any], folder: str) -> Callable[..., Any]:
    signature = inspect.signature(add_datasample)

    def add(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        if given.arguments.get("out_file") is not None:
            path = Path(given.arguments["out_file"])
            given.arguments["out_file"] = str(path.parent / folder / path.name)
        return add_datasample(*given.args, **given.kwargs)

    return add


@contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of one object inside the context; restore it afterwards."""
    own = vars(target).get(name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(target, name)
        else:
            setattr(target, name, own)
