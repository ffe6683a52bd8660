"""Binary masks in COCO's formats: polygons, and run lengths for crowds."""

from __future__ import annotations

import numpy as np

_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # (y, x): right, down, left, up; the next one is a turn to the right


def polygons(mask: np.ndarray) -> list[list[int]]:
    """Polygons ``[x0, y0, x1, y1, ...]`` along pixel edges that cover exactly the mask (H, W).

    COCO's polygons cannot have holes, so a region is cut in two at a hole.
    """
    if not mask.any():
        return []
    left, top, width, height = bounding_box(mask)
    loops = _outlines(mask[top : top + height, left : left + width])
    hole = next((loop for loop in loops if _area(loop) < 0), None)
    if hole is None:
        return [[number for y, x in loop for number in (x + left, y + top)] for loop in loops]
    across = [x for _, x in hole]
    cut = left + (min(across) + max(across)) // 2
    before, after = mask.copy(), mask.copy()
    before[:, cut:] = False
    after[:, :cut] = False
    return polygons(before) + polygons(after)


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of the mask (H, W): column by column, alternately outside and inside."""
    flat = np.concatenate([[False], mask.ravel(order="F").astype(bool)])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], starts, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def bounding_box(mask: np.ndarray) -> list[int]:
    """Bounding box ``[x, y, width, height]`` of the mask (H, W), in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(n) for n in (columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])]


def _outlines(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Corners (y, x) of each closed outline of the mask, clockwise; counter-clockwise for holes."""
    padded = np.pad(mask.astype(bool), 1)
    inside = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])  # above, right, below, left
    corners = ((0, 0), (0, 1), (1, 1), (1, 0))  # start of a pixel's edge towards each neighbour, clockwise
    edges = {
        (int(y) + dy, int(x) + dx, heading): None  # a dict, for its order
        for heading, (neighbour, (dy, dx)) in enumerate(zip(neighbours, corners, strict=True))
        for y, x in np.argwhere(inside & ~neighbour)
    }
    loops = []
    while edges:
        first = edge = next(iter(edges))
        loop: list[tuple[int, int]] = []
        walked: list[tuple[int, int, int]] = []
        while not walked or edge != first:
            walked.append(edge)
            y, x, heading = edge[0] + _STEPS[edge[2]][0], edge[1] + _STEPS[edge[2]][1], edge[2]
            # Try a right turn first: where two pixels touch at a corner, the outline then stays with the same pixel.
            turn = next(turn for turn in (1, 0, 3) if (y, x, (heading + turn) % 4) in edges)
            if turn:
                loop.append((y, x))
            edge = (y, x, (heading + turn) % 4)
        for edge in walked:
            del edges[edge]
        loops.append(loop)
    return loops


def _area(loop: list[tuple[int, int]]) -> float:
    """Signed area of an outline: positive if it is clockwise."""
    return sum(x0 * y1 - x1 * y0 for (y0, x0), (y1, x1) in zip(loop, [*loop[1:], loop[0]], strict=True)) / 2
