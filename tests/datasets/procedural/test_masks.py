"""Masks as COCO writes them, against pycocotools' own decoder."""

import numpy as np
import pytest
from pycocotools import mask as coco

from mmsnnet.datasets.procedural.masks import bounding_box, polygons, run_lengths


def filled(shapes: list[list[int]], size: tuple[int, int]) -> np.ndarray:
    return coco.decode(coco.merge(coco.frPyObjects(shapes, *size))).astype(bool)


def ring(size: int, outer: float, inner: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    return (np.hypot(y, x) < outer) & (np.hypot(y, x) > inner)


def test_one_pixel_is_a_square_of_its_four_corners():
    mask = np.zeros((4, 5), bool)
    mask[1, 3] = True
    (square,) = polygons(mask)
    corners = set(zip(square[::2], square[1::2], strict=True))
    assert len(square) == 8 and corners == {(3, 1), (4, 1), (4, 2), (3, 2)}
    assert bounding_box(mask) == [3, 1, 1, 1]


def test_a_rectangle_has_four_corners_only():
    mask = np.zeros((9, 9), bool)
    mask[2:6, 1:8] = True
    (rectangle,) = polygons(mask)
    assert set(zip(rectangle[::2], rectangle[1::2], strict=True)) == {(1, 2), (8, 2), (8, 6), (1, 6)}
    assert bounding_box(mask) == [1, 2, 7, 4]


def test_an_empty_mask_has_no_polygon():
    assert polygons(np.zeros((4, 4), bool)) == []


@pytest.mark.parametrize("density", [0.3, 0.6, 0.9])
def test_polygons_and_run_lengths_decode_to_the_mask(density):
    """Any mask: pieces, holes in holes, pixels that touch at a corner, borders of the image."""
    rng = np.random.default_rng(int(100 * density))
    for _ in range(60):
        size = tuple(int(side) for side in rng.integers(2, 16, 2))
        mask = rng.random(size) < density
        mask[rng.integers(size[0]), rng.integers(size[1])] = True
        np.testing.assert_array_equal(filled(polygons(mask), size), mask)
        counts = run_lengths(mask)
        assert counts["size"] == list(size) and sum(counts["counts"]) == mask.size
        np.testing.assert_array_equal(coco.decode(coco.frPyObjects(counts, *size)).astype(bool), mask)


def test_a_hole_is_left_open_by_cutting_in_two():
    mask = ring(40, 18, 9)
    parts = polygons(mask)
    assert len(parts) == 2
    np.testing.assert_array_equal(filled(parts, (40, 40)), mask)


def test_polygons_enclose_as_many_pixels_as_the_mask_has():
    """By the shoelace formula, so that whatever reads COCO's polygons finds the annotated area."""
    mask = ring(40, 18, 9)
    area = 0.0
    for part in polygons(mask):
        x, y = np.array(part[::2]), np.array(part[1::2])
        area += abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    assert area == mask.sum()


def test_run_lengths_go_down_the_columns_and_start_outside():
    mask = np.array([[1, 0, 1], [1, 0, 0]], bool)
    assert run_lengths(mask) == {"size": [2, 3], "counts": [0, 2, 2, 1, 1]}
    assert run_lengths(~mask) == {"size": [2, 3], "counts": [2, 2, 1, 1]}
