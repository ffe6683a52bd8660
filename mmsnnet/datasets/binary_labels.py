"""Label maps of nothing but 0 and 255, as most tools write a binary mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmseg.datasets.transforms import LoadAnnotations

from mmsnnet.datasets.dataset_parts import evenly_spaced, transforms_of
from mmsnnet.datasets.transforms.segmentation import IGNORED, LoadSegLabels
from mmsnnet.errors import DataError

SAMPLES = 8
"""The number of label maps that are read."""


def binary_mask_warning(dataset: Any) -> str | None:
    """A warning of a data set whose label maps hold both 0 and 255 and nothing else; None for other data sets.

    255 means "no label", so that a model would never see any class but the first. Up to 8 label maps are read, spread
    evenly over the data set.

    Args:
        dataset: a built data set of mmseg's. None comes of a set with a single class, and of one whose pipeline loads
            no labels or loads them by ``LoadSegLabels`` with ``values``.

    Raises:
        MissingFileError: a label map does not exist.
        DataError: a label map cannot be decoded, or has values that are not stored as whole numbers.
    """
    stock = next((transform for transform in transforms_of(dataset) if isinstance(transform, LoadAnnotations)), None)
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes") or ()
    if isinstance(stock, LoadSegLabels):
        loader: LoadSegLabels | None = stock
    else:  # mmseg's loader takes 255 for "no label" as well
        loader = None if stock is None or not classes else LoadSegLabels(num_classes=min(len(classes), 254))
    if loader is None or loader.values is not None or loader.num_classes < 2:
        return None
    samples = [dataset.get_data_info(index) for index in evenly_spaced(len(dataset), SAMPLES)]
    samples = [sample for sample in samples if sample.get("seg_map_path")]
    present = set()
    for sample in samples:
        try:
            values = loader.stored_values(sample["seg_map_path"], sample["img_path"])
        except DataError:
            if loader is stock:
                raise
            return None  # mmseg's loader may be able to read it
        if not np.isin(values, (0, IGNORED)).all():
            return None
        present |= {value for value in (0, IGNORED) if (values == value).any()}
    if present != {0, IGNORED}:
        return None
    zero = "0 and 255 both mean" if samples[0].get("reduce_zero_label") else "255 means"
    return (
        f"{samples[0]['seg_map_path']} and the {len(samples) - 1} other label maps that were read, of {len(dataset)}, "
        f"hold nothing but 0 and 255, and {zero} 'no label': the model never sees the classes from 1 on; for masks of "
        "0 and 255 set values=(0, 255) of mmsnnet.LoadSegLabels, and reduce_zero_label=False of the data set"
    )
