"""Metrics and hooks write into a folder for each stitch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.hooks import Hook
from mmengine.visualization import LocalVisBackend, Visualizer

from mmsnnet.engine.runner.stitch_files import StitchPictures, make_folders, output_paths
from mmsnnet.errors import UserError


class Metric:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("output_dir", "masks", "masks/S"),
        ("output_dir", "masks/", "masks/S"),
        ("output_dir", Path("masks"), "masks/S"),
        ("seg_out_dir", "a/r.panoptic", "a/r.panoptic/S"),
        ("save_dir", "/x/y", "/x/y/S"),
        ("outfile_prefix", "a/results", "a/S/results"),
        ("outfile_prefix", "results", "S/results"),
        ("outfile_prefix", "a/b/", "a/b/S"),
        ("out_file_path", "a/dump.pkl", "a/S/dump.pkl"),
        ("outfile_path", "dump.jsonl", "S/dump.jsonl"),
        ("out_file", "dump.jsonl", "S/dump.jsonl"),
        ("_output_file", "a/dump.json", "a/S/dump.json"),
        ("proposals_file", "a/p.pkl", "a/S/p.pkl"),
        ("results_path", "a/p.csv", "a/S/p.csv"),
        ("outdir", "masks", "masks/S"),
        ("output_dir", "s3://bucket/masks", "s3://bucket/masks/S"),
        ("output_dir", None, None),
        ("output_dir", "", None),
        ("output_dir", 3, None),
        ("ann_file", "a/instances.json", None),
        ("seg_prefix", "a/masks", None),
        ("prefix", "coco", None),
        ("gt_dir", "a", None),
        ("collect_dir", "a", None),
        ("default_prefix", "coco", None),
        ("output_format", "png", None),
    ],
)
def test_paths(name: str, value: Any, path: str | None) -> None:
    assert output_paths(Metric(**{name: value}, results=[]), "S") == ({} if path is None else {name: path})


def test_folders_are_made(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    metric = Metric(
        output_dir=str(tmp_path / "a"),
        out_file_path=str(tmp_path / "b" / "x.pkl"),
        output_path=str(tmp_path / "c"),  # a folder, as it is one
        outfile_prefix="s3://x/y",
    )
    make_folders(metric, "S")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "a",
        "a/S",
        "b",
        "b/S",
        "c",
        "c/S",
    ]
    assert output_paths(metric, "S")["output_path"] == str(tmp_path / "c" / "S")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.pkl cannot be written \(it is a folder\).*Metric\.out_file_path"):
        (tmp_path / "x.pkl").mkdir()
        make_folders(Metric(out_file_path=str(tmp_path / "x.pkl")))


class Draws(Hook):
    def __init__(self, visualizer: Visualizer) -> None:
        self._visualizer = visualizer
        self._test_index = 0


class Drawing(Visualizer):
    """With the signature that the toolboxes' visualizers have."""

    def add_datasample(
        self, name: str, image: Any, data_sample: Any = None, out_file: str | None = None, step: int = 0
    ) -> None:
        if out_file is None:
            self.add_image(name, image, step)
        else:
            Path(out_file).parent.mkdir(parents=True, exist_ok=True)
            Path(out_file).touch()


def test_pictures(tmp_path: Path) -> None:
    own, other = (Drawing(vis_backends=[dict(type="LocalVisBackend")], save_dir=str(tmp_path / n)) for n in "ab")
    hook = Draws(other)
    pictures = StitchPictures([hook, Hook()], own, ["S", "L"])
    image = np.zeros((4, 4, 3), np.uint8)
    for _ in range(2):
        for stitch in ("S", "L"):
            with pictures.of(stitch):
                hook._test_index += 1
                hook._visualizer.add_datasample("test", image, step=hook._test_index)
                hook._visualizer.add_datasample("test", image, out_file=str(tmp_path / "c" / f"{hook._test_index}.jpg"))
                own.add_image("deep/name", image)
    with pytest.raises(ZeroDivisionError), pictures.of("S"):
        raise ZeroDivisionError
    own.add_image("after", image)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    numbers = [(stitch, number) for stitch in "SL" for number in (1, 2)]
    assert {path for path in found if path[0] in "bc"} == {
        *(f"b/vis_data/vis_image/{stitch}/test_{number}.png" for stitch, number in numbers),
        *(f"c/{stitch}/{number}.jpg" for stitch, number in numbers),
    }
    assert {"a/vis_data/vis_image/after_0.png", "a/vis_data/vis_image/S/deep/name_0.png"} <= found
    assert hook._test_index == 2
    for visualizer in (own, other):
        assert not {"add_image", "add_datasample"} & set(vars(visualizer))
        assert isinstance(next(iter(visualizer._vis_backends.values())), LocalVisBackend)
