"""Rooms with furniture and balls, seen through a pinhole camera: pictures and true depth.

Lengths are in metres. In the room, x points right, y up and z away from the wall behind the camera. Depth is the
distance along the optical axis, as a depth camera measures it, not along the ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmsnnet.datasets.procedural.shapes import check_size
from mmsnnet.datasets.procedural.textures import PATTERNS, colour, photograph

NEAREST, FARTHEST = 0.5, 10.0
"""Range of the sensor; a surface outside it has no depth."""
FOCAL = 519 / 640
"""Focal length divided by the image's width, of the Kinect that took NYUv2."""
BASELINE = 0.075
"""Distance of the sensor's projector to the right of the camera. A surface in its shadow has no depth."""
_PATTERNS = ("plain", "plain", "stripes", "checks", "dots")
_PER_METRE = 40  # units of the patterns


@dataclass(frozen=True)
class Box:
    """Box around ``centre`` with sides of twice ``half``, rotated by ``angle`` about the vertical axis.

    ``hollow``: seen from inside, as a room is.
    """

    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    angle: float = 0.0
    hollow: bool = False

    def distances(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Distance (N,) from ``origin`` (3,) to the surface, in lengths of each direction (3, N); inf if missed."""
        start, along = _rotate(origin - np.array(self.centre), self.angle), _rotate(directions, self.angle)
        half = np.array(self.half)
        with np.errstate(divide="ignore", invalid="ignore"):
            to_sides = np.stack([(-half - start)[:, None] / along, (half - start)[:, None] / along])
        enters, leaves = to_sides.min(axis=0).max(axis=0), to_sides.max(axis=0).min(axis=0)
        if self.hollow:
            return leaves
        return np.where((enters < leaves) & (enters > 0), enters, np.inf)

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Describe points (3, N) on the surface.

        Returns:
            Normals (3, N) towards the visible side, coordinates (2, N) on the face, and the face's number (N,), 0 to 5.
        """
        local = _rotate(points - np.array(self.centre)[:, None], self.angle)  # in the box's axes
        axis = np.argmax(abs(local) / np.array(self.half)[:, None], axis=0)
        each = np.arange(local.shape[1])
        positive = local[axis, each] > 0
        normals = np.zeros_like(local)
        normals[axis, each] = np.where(positive != self.hollow, 1, -1)
        # Height is the second coordinate on upright faces.
        first, second = np.where(axis == 0, 2, 0), np.where(axis == 1, 2, 1)
        coordinates = np.stack([local[first, each], local[second, each]])
        return _rotate(normals, -self.angle), coordinates, 2 * axis + positive


@dataclass(frozen=True)
class Ball:
    """Ball of ``radius`` around ``centre``."""

    centre: tuple[float, float, float]
    radius: float

    def distances(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Like :meth:`Box.distances`."""
        start = origin - np.array(self.centre)
        a, b, c = (directions**2).sum(axis=0), start @ directions, start @ start - self.radius**2
        discriminant = b**2 - a * c
        hits = (discriminant > 0) & (b < 0)
        return np.where(hits, (-b - np.sqrt(np.where(hits, discriminant, 0))) / a, np.inf)

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Like :meth:`Box.surface`; a ball has one face, with longitude and latitude in metres along its equator."""
        normals = (points - np.array(self.centre)[:, None]) / self.radius
        longitude, latitude = np.arctan2(normals[0], normals[2]), np.arcsin(np.clip(normals[1], -1, 1))
        return normals, self.radius * np.stack([longitude, latitude]), np.zeros(points.shape[1], int)


Solid = Box | Ball


@dataclass(frozen=True)
class Camera:
    """Pinhole camera at ``position``, rotated by ``yaw`` to the right and ``pitch`` down."""

    position: tuple[float, float, float]
    yaw: float = 0.0
    pitch: float = 0.0

    def directions(self, size: tuple[int, int]) -> np.ndarray:
        """Directions (3, H * W) through the pixel centres of an image of ``size`` (H, W), in the room's axes.

        Their length along the optical axis is 1.
        """
        height, width = size
        x = (np.arange(width) + 0.5 - width / 2) / (FOCAL * width)
        y = (height / 2 - np.arange(height) - 0.5) / (FOCAL * width)
        x, y = (grid.ravel() for grid in np.meshgrid(x, y))
        cos, sin = np.cos(self.pitch), np.sin(self.pitch)
        y, z = cos * y - sin, cos + sin * y
        return np.stack([np.cos(self.yaw) * x + np.sin(self.yaw) * z, y, np.cos(self.yaw) * z - np.sin(self.yaw) * x])

    def beside(self, distance: float) -> np.ndarray:
        """Position (3,) at a distance to the right of the camera."""
        return np.array(self.position) + distance * np.array([np.cos(self.yaw), 0, -np.sin(self.yaw)])


def cast(solids: Sequence[Solid], origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cast rays from ``origin`` (3,) along directions (3, N).

    Returns:
        The distance (N,) to the first surface, in lengths of each direction, and the index (N,) of its solid.
    """
    distances = np.stack([solid.distances(origin, directions) for solid in solids])
    nearest = distances.argmin(axis=0)
    return distances[nearest, np.arange(distances.shape[1])], nearest


def depth_map(solids: Sequence[Solid], camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """Depth (H, W) in millimetres, uint16.

    It is 0 where the sensor measures none: too near, too far, or in the projector's shadow.
    """
    origin, directions = np.array(camera.position), camera.directions(size)
    depth, _ = cast(solids, origin, directions)
    lit = _sees(solids, camera.beside(BASELINE), origin[:, None] + depth * directions)
    valid = lit & (depth >= NEAREST) & (depth <= FARTHEST)
    return np.where(valid, np.round(1000 * depth), 0).astype(np.uint16).reshape(size)


def make_room(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Furnish a random room and photograph it.

    Returns:
        The RGB image (H, W, 3), uint8, and the depth (H, W) of :func:`depth_map`.

    Raises:
        ValueError: a side is below ``MIN_SIDE``.
    """
    check_size(size)
    solids, camera = _furnish(rng)
    return _picture(rng, solids, camera, size), depth_map(solids, camera, size)


def _furnish(rng: np.random.Generator) -> tuple[list[Solid], Camera]:
    """Draw the room, its furniture and balls, and a camera near its rear wall that looks forwards and slightly down."""
    width, height, length = rng.uniform(2.5, 7), rng.uniform(2.3, 3.2), rng.uniform(3, 10.5)
    room = Box((0, height / 2, length / 2), (width / 2, height / 2, length / 2), hollow=True)
    camera = Camera(
        (rng.uniform(-0.25, 0.25) * width, rng.uniform(0.9, 1.7), rng.uniform(0.3, 0.6)),
        yaw=rng.uniform(-0.4, 0.4),
        pitch=rng.uniform(0, 0.4),
    )
    solids: list[Solid] = [room]
    solid: Solid
    for _ in range(int(rng.integers(6, 14))):
        x, z = rng.uniform(-0.5, 0.5) * width, rng.uniform(0, length)
        if rng.random() < 0.3:
            radius = rng.uniform(0.1, 0.4)
            solid, reach = Ball((x, radius, z), radius), radius
        else:
            half = rng.uniform(0.15, 0.7), rng.uniform(0.15, 1.0), rng.uniform(0.15, 0.7)
            solid, reach = Box((x, half[1], z), half, angle=rng.uniform(0, np.pi)), np.hypot(half[0], half[2])
        # Keep solids away from the camera, so that none fills the picture.
        if np.hypot(x - camera.position[0], z - camera.position[2]) > reach + 0.7:
            solids.append(solid)
    return solids, camera


def _picture(rng: np.random.Generator, solids: Sequence[Solid], camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """Photograph (H, W, 3) textured surfaces, lit by one lamp below the ceiling, with shadows."""
    origin, directions = np.array(camera.position), camera.directions(size)
    depth, nearest = cast(solids, origin, directions)
    points = origin[:, None] + depth * directions
    (room,) = (solid for solid in solids if isinstance(solid, Box) and solid.hollow)
    lamp = np.array(room.centre) + np.array(room.half) * [rng.uniform(-0.6, 0.6), 0.9, rng.uniform(-0.8, 0.4)]
    to_lamp = lamp[:, None] - points
    lamp_distance = np.linalg.norm(to_lamp, axis=0)
    canvas = np.zeros((points.shape[1], 3), np.float32)
    facing = np.zeros(points.shape[1])
    for index, solid in enumerate(solids):
        pixels = np.flatnonzero(nearest == index)
        if not len(pixels):
            continue
        normals, coordinates, faces = solid.surface(points[:, pixels])
        facing[pixels] = (normals * to_lamp[:, pixels]).sum(axis=0) / lamp_distance[pixels]
        # Each face of the room has its own colour; furniture has one colour.
        groups = [faces == face for face in np.unique(faces)] if solid is room else [slice(None)]
        for group in groups:
            pattern = PATTERNS[_PATTERNS[rng.integers(len(_PATTERNS))]]
            values = pattern(rng, *(_PER_METRE * coordinates[:, group]))
            canvas[pixels[group]] = colour(rng, values, rng.uniform(15, 70))
    direct = np.maximum(facing, 0) * _sees(solids, lamp, points) / (1 + (lamp_distance / 4) ** 2)
    canvas *= (0.45 + 0.75 * direct)[:, None]
    return photograph(rng, canvas.reshape(*size, 3))


def _sees(solids: Sequence[Solid], origin: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether each of the points (3, N), which lie on surfaces, is visible from ``origin`` (3,)."""
    return cast(solids, origin, points - origin[:, None])[0] > 1 - 1e-3


def _rotate(vectors: np.ndarray, angle: float) -> np.ndarray:
    """Rotate vectors (3, ...) about the vertical axis."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y, z = vectors
    return np.stack([cos * x - sin * z, y, sin * x + cos * z])
