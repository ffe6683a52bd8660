"""Results that the paper of SN-Netv2 reports (arXiv 2307.00154), to draw beside measured ones."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2307.00154, Table 1"


@dataclass(frozen=True)
class Reported:
    """Reported result of a single network, or range over the stitches of a stitched one.

    ``gflops`` (1e9 multiply-accumulates for one input) and ``quality`` are (lowest, highest), equal for a single
    network.
    """

    name: str
    gflops: tuple[float, float]
    quality: tuple[float, float]

    @property
    def is_range(self) -> bool:
        return self.gflops[0] < self.gflops[1]


@dataclass(frozen=True)
class Reference:
    """Results of :data:`SOURCE` for one data set; ``dataset`` is its name in a file of operating points."""

    dataset: str
    metric: str
    input_shape: tuple[int, int]
    results: tuple[Reported, ...]


def _alone(name: str, gflops: float, quality: float) -> Reported:
    return Reported(f"DeiT3-{name}", (gflops, gflops), (quality, quality))


REFERENCES = {
    "ade20k": Reference(
        "ADE20KDataset",
        "mIoU",
        (512, 512),
        (
            *(_alone("S", 32, 45.5), _alone("B", 108, 48.6), _alone("L", 363, 52.3)),
            Reported("SN-Netv2 S-L", (34, 363), (45.6, 51.4)),
            Reported("SN-Netv2 B-L", (110, 363), (48.5, 52.2)),
        ),
    ),
    "coco_stuff10k": Reference(
        "COCOStuffDataset",
        "mIoU",
        (512, 512),
        (
            *(_alone("S", 32, 39.6), _alone("B", 108, 42.7), _alone("L", 363, 47.8)),
            Reported("SN-Netv2 S-L", (34, 363), (40.1, 48.2)),
            Reported("SN-Netv2 B-L", (110, 363), (42.7, 48.1)),
        ),
    ),
}
