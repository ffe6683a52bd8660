"""Procedural data sets in the layouts of real ones, and checks of data that the toolboxes lack."""

from mmsnnet.datasets.folders import check_folders
from mmsnnet.datasets.procedural.layouts import LAYOUTS, SPLITS, scene_rng, write_shapes
from mmsnnet.datasets.procedural.rooms import make_room
from mmsnnet.datasets.procedural.shapes import CLASSES, MIN_SIDE, PALETTE, make_scene

__all__ = [
    "CLASSES",
    "LAYOUTS",
    "MIN_SIDE",
    "PALETTE",
    "SPLITS",
    "check_folders",
    "make_room",
    "make_scene",
    "scene_rng",
    "write_shapes",
]
