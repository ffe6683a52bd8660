from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric as _CocoMetric
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from mmsnnet.errors import SettingError
from mmsnnet.registry import METRICS

ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


@METRICS.register_module()
class CocoMetric(_CocoMetric):
    """mmdet's ``CocoMetric`` for many stitches: all of them get all figures, and the console is left to the progress.

    Without ``ann_file`` it takes the ground truth from the file that the samples name: ``ann_file`` among the
    ``meta_keys`` of the test pipeline's ``PackDetInputs``, which :class:`mmsnnet.datasets.coco.CocoDataset` gives. A
    model that detects nothing scores 0, where mmdet's gives no figures. What COCO's code prints goes to the log.

    Args:
        ann_file: the ground truth; by default the file that the samples name.
        options: of mmdet's ``CocoMetric``.

    Raises:
        ValueError: without ``ann_file``, samples of several files, or samples that name none.
    """

    def __init__(self, ann_file: str | None = None, **options: Any) -> None:
        super().__init__(ann_file=ann_file, **options)
        self._is_given = ann_file is not None
        self._found: str | None = None

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        if not self._is_given:
            for sample in data_samples:
                self._read_ground_truth_of(sample)
        super().process(data_batch, data_samples)

    def _read_ground_truth_of(self, sample: dict[str, Any]) -> None:
        file = sample.get("ann_file")
        if file is None and "instances" not in sample:  # mmdet's own way: the ground truth in the samples
            raise SettingError(
                "CocoMetric finds no ground truth: add 'ann_file' to meta_keys of PackDetInputs in the test pipeline, "
                "with a data set of type mmsnnet.CocoDataset, or set ann_file of the evaluator"
            )
        if file == self._found:
            return
        if self._found is not None:
            raise SettingError(
                f"CocoMetric measures against one annotation file, the data set has samples of {self._found} and "
                f"{file}: set ann_file of the evaluator to a file of all of them, or evaluate one at a time"
            )
        with get_local_path(file, backend_args=self.backend_args) as path, redirect_stdout(io.StringIO()):
            self._coco_api = COCO(path)
        self._found = file

    def compute_metrics(self, results: Sequence[Any]) -> dict[str, float]:
        with redirect_stdout(io.StringIO()) as printed:
            found = super().compute_metrics(results)
        print_log(printed.getvalue(), logger="current")
        if self.format_only:
            return found
        wanted = [
            f"{metric}_{item}"
            for metric in self.metrics
            if metric in ("bbox", "segm")
            for item in self.metric_items or ITEMS
        ]
        return {name: 0.0 for name in wanted} | found
