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
from mmsnnet.evaluation.metric_names import COCO_ITEMS
from mmsnnet.registry import METRICS


@METRICS.register_module()
class CocoMetric(_CocoMetric):
    """mmdet's ``CocoMetric`` for many stitches, which all get every value.

    Without ``ann_file``, the samples name the file of the ground truth: :class:`mmsnnet.datasets.coco.CocoDataset`
    lists it as ``ann_file``, and the test pipeline's ``PackDetInputs`` passes it on if ``meta_keys`` has that name. A
    model without detections scores 0; mmdet's metric gives no values then. The output of COCO's code goes to the log,
    because the console shows the progress.

    Args:
        ann_file: the ground truth; by default the file that the samples name.
        options: of mmdet's ``CocoMetric``.

    Raises:
        SettingError: without ``ann_file``, the samples name several files or none.
    """

    def __init__(self, ann_file: str | None = None, **options: Any) -> None:
        super().__init__(ann_file=ann_file, **options)
        self._has_ann_file = ann_file is not None
        self._file_of_samples: str | None = None
        # The copies of this metric, one for each stitch, share attributes whose names end with _api, and so read once.
        self._samples_api: dict[str, COCO] = {}

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        if not self._has_ann_file:
            for sample in data_samples:
                self._read_ground_truth_of(sample)
        super().process(data_batch, data_samples)

    def _read_ground_truth_of(self, sample: dict[str, Any]) -> None:
        file: Any = sample.get("ann_file")
        if file is None and "instances" not in sample:  # mmdet's metric takes the ground truth from the samples
            raise SettingError(
                "CocoMetric finds no ground truth: add 'ann_file' to meta_keys of PackDetInputs in the test pipeline, "
                "with a data set of type mmsnnet.CocoDataset, or set ann_file of the evaluator"
            )
        if file == self._file_of_samples:
            return
        if self._file_of_samples is not None:
            raise SettingError(
                f"CocoMetric needs a single annotation file, but there are samples of {self._file_of_samples} and "
                f"{file}: set ann_file of the evaluator to a file of all of them, or evaluate one at a time"
            )
        if file not in self._samples_api:
            with get_local_path(file, backend_args=self.backend_args) as path, redirect_stdout(io.StringIO()):
                self._samples_api[file] = COCO(path)
        self._coco_api = self._samples_api[file]
        self._file_of_samples = file

    def compute_metrics(self, results: Sequence[Any]) -> dict[str, float]:
        with redirect_stdout(io.StringIO()) as printed:
            values = super().compute_metrics(results)
        print_log(printed.getvalue(), logger="current")
        if self.format_only:
            return values
        families = [metric for metric in self.metrics if metric in ("bbox", "segm")]
        names = (f"{family}_{item}" for family in families for item in self.metric_items or COCO_ITEMS)
        return dict.fromkeys(names, 0.0) | values
