"""How far the outputs of an export are from PyTorch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

# Outputs whose second axis has classes; the class with the largest value is what a user sees.
CLASS_OUTPUTS = ("logits",)
# The difference of a box counts against its longer side, or so many pixels where it is shorter.
LEAST_SIDE = 100.0


class Difference(NamedTuple):
    """The largest difference, and the share of equal classes.

    The difference is a share of the largest output where that exceeds 1; of a box, a share of its longer side where
    that exceeds 100 pixels, and else of 100 pixels.
    """

    difference: float
    agreement: float | None = None

    @classmethod
    def worst(cls, differences: Iterable[Difference]) -> Difference:
        """The worst of several."""
        differences = list(differences)
        agreements = [one.agreement for one in differences if one.agreement is not None]
        return cls(max(one.difference for one in differences), min(agreements, default=None))


def compare(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Difference:
    """Compare outputs by name; NaN, and outputs of other shapes, differ infinitely."""
    largest, agreements = 0.0, []
    for name, wanted in expected.items():
        value = given[name]
        if value.shape != wanted.shape or not wanted.isfinite().all() or not value.isfinite().all():
            return Difference(float("inf"))
        if value.numel() == 0:
            continue
        if name == "boxes":
            scale = (wanted[..., 2:] - wanted[..., :2]).abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_SIDE)
        else:
            scale = wanted.abs().max().clamp(min=1)
        largest = max(largest, float(((value - wanted).abs() / scale).max()))
        if name in CLASS_OUTPUTS and wanted.shape[1] > 1:
            agreements.append(float((value.argmax(dim=1) == wanted.argmax(dim=1)).double().mean()))
    return Difference(largest, min(agreements, default=None))
