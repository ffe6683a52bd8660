"""Label maps of 0 and 255 alone, as most tools write a binary mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmseg.datasets.transforms import LoadAnnotations

from mmsnnet.datasets.transforms.segmentation import IGNORED, LoadSegLabels
from mmsnnet.errors import DataError

SAMPLES = 8
"""Label maps that are read of a set."""


def binary_mask_warning(dataset: Any) -> str | None:
    """One line about a set whose label maps hold nothing but 0 and 255, both of them; None for any other set.

    255 means "no label", so that no class but the first would ever be seen. Up to 8 label maps are read, spread evenly
    over the set.

    Args:
        dataset: a built data set of mmseg's, or a wrapper of such sets. One of a single class, or whose pipeline
            loads no labels, or by ``LoadSegLabels`` with ``values``, is passed over.

    Raises:
        MissingFileError: there is no such label map.
        DataError: a label map cannot be decoded, or has values that are not stored as whole numbers.
    """
    inner = getattr(dataset, "datasets", None) or ([dataset.dataset] if hasattr(dataset, "dataset") else [])
    if inner:
        return next((warning for member in inner if (warning := binary_mask_warning(member))), None)
    transforms = getattr(getattr(dataset, "pipeline", None), "transforms", ())
    stock = next((transform for transform in transforms if isinstance(transform, LoadAnnotations)), None)
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes") or ()
    if isinstance(stock, LoadSegLabels):
        loader: LoadSegLabels | None = stock
    else:  # mmseg's own takes 255 for "no label" as well
        loader = None if stock is None or not classes else LoadSegLabels(num_classes=min(len(classes), 254))
    if loader is None or loader.values is not None or loader.num_classes < 2:
        return None
    numbers = np.unique(np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset))).round().astype(int))
    samples = [dataset.get_data_info(int(number)) for number in numbers]
    samples = [sample for sample in samples if sample.get("seg_map_path")]
    found = set()
    for sample in samples:
        try:
            values = loader.stored_values(sample["seg_map_path"], sample["img_path"])
        except DataError:
            if loader is stock:
                raise
            return None  # mmseg's loader has rules of its own
        present = {value for value in (0, IGNORED) if (values == value).any()}
        if not np.isin(values, (0, IGNORED)).all():
            return None
        found |= present
    if found != {0, IGNORED}:
        return None
    zero = "0 and 255 both mean" if samples[0].get("reduce_zero_label") else "255 means"
    return (
        f"{samples[0]['seg_map_path']} and all {len(samples) - 1} others that were looked at, of {len(dataset)} label "
        f"maps, hold nothing but 0 and 255, and {zero} 'no label': the classes from 1 on are never seen; for masks of "
        "0 and 255 set values=(0, 255) of mmsnnet.LoadSegLabels, and reduce_zero_label=False of the data set"
    )
