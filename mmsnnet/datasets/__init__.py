"""What the toolboxes lack: small procedural sets in the folders and file names of the real ones."""

from mmsnnet.datasets.shapes import CLASSES, LAYOUTS, MIN_SIDE, PALETTE, SPLITS, make_scene, scene_rng, write_shapes

__all__ = ["CLASSES", "LAYOUTS", "MIN_SIDE", "PALETTE", "SPLITS", "make_scene", "scene_rng", "write_shapes"]
