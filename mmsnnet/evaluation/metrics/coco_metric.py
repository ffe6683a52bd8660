from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric as _CocoMetric
from mmengine.logging import print_log

from mmsnnet.registry import METRICS

ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


@METRICS.register_module()
class CocoMetric(_CocoMetric):
    """mmdet's ``CocoMetric`` for many stitches: all of them get all figures, and the console is left to the progress.

    Without ``ann_file`` it takes the ground truth from the file that the evaluated :class:`mmsnnet.datasets.coco.
    CocoDataset` is read from. A model that detects nothing scores 0, where mmdet's gives no figures. What COCO's code
    prints goes to the log.
    """

    @property
    def dataset_meta(self) -> dict[str, Any] | None:
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict[str, Any]) -> None:
        self._dataset_meta = dataset_meta
        if self._coco_api is None and "ann_file" in dataset_meta:
            with redirect_stdout(io.StringIO()):
                self._coco_api = COCO(dataset_meta["ann_file"])

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
