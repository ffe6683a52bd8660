"""Rooms with furniture and balls, seen through a pinhole camera: pictures and true depth.

Lengths are in metres; in the room x goes to the right, y up and z away from the wall behind the camera. Depth is what a
depth camera measures: the distance along the optical axis, not along the ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmsnnet.datasets.procedural.shapes import check_size
from mmsnnet.datasets.procedural.textures import PATTERNS, colour, photograph

NEAREST, FARTHEST = 0.5, 10.0
"""What lies outside has no depth, as with the sensor."""
FOCAL = 519 / 640
"""The focal length as a share of the image's width: that of the Kinect with which NYUv2 was taken."""
BASELINE = 0.075
"""How far to the right of the camera the sensor's projector sits: what it does not light has no depth."""
_PATTERNS = ("plain", "plain", "stripes", "checks", "dots")
_PER_METRE = 40  # of the patterns' units


@dataclass(frozen=True)
class Box:
    """A box with its middle at ``centre`` and sides of twice ``half``, turned by ``angle`` about the vertical axis.
    ``hollow``: seen from within, as a room is."""

    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    angle: float = 0.0
    hollow: bool = False

    def distances(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """How many times each of the directions (3, N) leads from ``origin`` (3,) to the surface; infinity if never."""
        start, along = self._own(origin - np.array(self.centre)), self._own(directions)
        half = np.array(self.half)
        with np.errstate(divide="ignore", invalid="ignore"):
            to_sides = np.stack([(-half - start)[:, None] / along, (half - start)[:, None] / along])
        enters, leaves = to_sides.min(axis=0).max(axis=0), to_sides.max(axis=0).min(axis=0)
        if self.hollow:
            return leaves
        return np.where((enters < leaves) & (enters > 0), enters, np.inf)

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For points (3, N) on the surface: normals (3, N) towards the side that is seen, coordinates (2, N) on the
        face, and the face's number (N,), from 0 to 5."""
        own = self._own(points - np.array(self.centre)[:, None])
        axis = np.argmax(abs(own) / np.array(self.half)[:, None], axis=0)
        each = np.arange(own.shape[1])
        positive = own[axis, each] > 0
        normals = np.zeros_like(own)
        normals[axis, each] = np.where(positive != self.hollow, 1, -1)
        # Height stays the second coordinate on upright faces.
        first, second = np.where(axis == 0, 2, 0), np.where(axis == 1, 2, 1)
        return self._own(normals, back=True), np.stack([own[first, each], own[second, each]]), 2 * axis + positive

    def _own(self, vectors: np.ndarray, back: bool = False) -> np.ndarray:
        """Vectors (3, ...) of the room as seen from the box's own axes, or back again."""
        cos, sin = np.cos(self.angle), np.sin(self.angle) * (-1 if back else 1)
        x, y, z = vectors
        return np.stack([cos * x - sin * z, y, sin * x + cos * z])


@dataclass(frozen=True)
class Ball:
    """A ball of ``radius`` about ``centre``."""

    centre: tuple[float, float, float]
    radius: float

    def distances(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """As of :class:`Box`."""
        start = origin - np.array(self.centre)
        a, b, c = (directions**2).sum(axis=0), start @ directions, start @ start - self.radius**2
        discriminant = b**2 - a * c
        hits = (discriminant > 0) & (b < 0)
        return np.where(hits, (-b - np.sqrt(np.where(hits, discriminant, 0))) / a, np.inf)

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As of :class:`Box`; a ball has one face, with its longitude and latitude, in metres along its equator."""
        normals = (points - np.array(self.centre)[:, None]) / self.radius
        longitude, latitude = np.arctan2(normals[0], normals[2]), np.arcsin(np.clip(normals[1], -1, 1))
        return normals, self.radius * np.stack([longitude, latitude]), np.zeros(points.shape[1], int)


Solid = Box | Ball


@dataclass(frozen=True)
class Camera:
    """A pinhole camera at ``position``, turned by ``yaw`` to the right and ``pitch`` down."""

    position: tuple[float, float, float]
    yaw: float = 0.0
    pitch: float = 0.0

    def directions(self, size: tuple[int, int]) -> np.ndarray:
        """The directions (3, H * W) in the room in which an image of ``size`` (H, W) looks through the middles of its
        pixels, of unit length along the optical axis."""
        height, width = size
        x = (np.arange(width) + 0.5 - width / 2) / (FOCAL * width)
        y = (height / 2 - np.arange(height) - 0.5) / (FOCAL * width)
        x, y = (grid.ravel() for grid in np.meshgrid(x, y))
        cos, sin = np.cos(self.pitch), np.sin(self.pitch)
        y, z = cos * y - sin, cos + sin * y
        return np.stack([np.cos(self.yaw) * x + np.sin(self.yaw) * z, y, np.cos(self.yaw) * z - np.sin(self.yaw) * x])

    def beside(self, distance: float) -> np.ndarray:
        """The place (3,) to the right of the camera."""
        return np.array(self.position) + distance * np.array([np.cos(self.yaw), 0, -np.sin(self.yaw)])


def cast(solids: Sequence[Solid], origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many times each of the directions (3, N) leads from ``origin`` (3,) to the first of the solids' surfaces, and
    which of them it is."""
    distances = np.stack([solid.distances(origin, directions) for solid in solids])
    nearest = distances.argmin(axis=0)
    return distances[nearest, np.arange(distances.shape[1])], nearest


def depth_map(solids: Sequence[Solid], camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """The depth (H, W) in millimetres, uint16; 0 where the sensor has none: too near, too far, or where something
    stands between the surface and the projector."""
    origin, directions = np.array(camera.position), camera.directions(size)
    depth, _ = cast(solids, origin, directions)
    lit = _sees(solids, camera.beside(BASELINE), origin[:, None] + depth * directions)
    valid = lit & (depth >= NEAREST) & (depth <= FARTHEST)
    return np.where(valid, np.round(1000 * depth), 0).astype(np.uint16).reshape(size)


def make_room(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Furnishes a room and looks into it.

    Returns the RGB image (H, W, 3), uint8, and the depth (H, W) of :func:`depth_map`.

    Raises:
        ValueError: a side is below ``MIN_SIDE``.
    """
    check_size(size)
    solids, camera = _furnish(rng)
    return _picture(rng, solids, camera, size), depth_map(solids, camera, size)


def _furnish(rng: np.random.Generator) -> tuple[list[Solid], Camera]:
    """The room, its furniture and balls, and a camera near the wall behind it that looks forwards and a little down."""
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
        # Nothing stands around the camera, nor so near that it would fill the picture.
        if np.hypot(x - camera.position[0], z - camera.position[2]) > reach + 0.7:
            solids.append(solid)
    return solids, camera


def _picture(rng: np.random.Generator, solids: Sequence[Solid], camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """The photograph (H, W, 3) of textured surfaces in the light of one lamp below the ceiling, shadows included."""
    origin, directions = np.array(camera.position), camera.directions(size)
    depth, nearest = cast(solids, origin, directions)
    points = origin[:, None] + depth * directions
    (room,) = (solid for solid in solids if isinstance(solid, Box) and solid.hollow)
    lamp = np.array(room.centre) + np.array(room.half) * [rng.uniform(-0.6, 0.6), 0.9, rng.uniform(-0.8, 0.4)]
    to_lamp = lamp[:, None] - points
    away = np.linalg.norm(to_lamp, axis=0)
    canvas = np.zeros((points.shape[1], 3), np.float32)
    facing = np.zeros(points.shape[1])
    for index, solid in enumerate(solids):
        mine = np.flatnonzero(nearest == index)
        if not len(mine):
            continue
        normals, coordinates, faces = solid.surface(points[:, mine])
        facing[mine] = (normals * to_lamp[:, mine]).sum(axis=0) / away[mine]
        # A room's faces have a colour each; furniture is of one piece.
        groups = [faces == face for face in np.unique(faces)] if solid is room else [slice(None)]
        for group in groups:
            pattern = PATTERNS[_PATTERNS[rng.integers(len(_PATTERNS))]]
            values = pattern(rng, *(_PER_METRE * coordinates[:, group]))
            canvas[mine[group]] = colour(rng, values, rng.uniform(15, 70))
    direct = np.maximum(facing, 0) * _sees(solids, lamp, points) / (1 + (away / 4) ** 2)
    canvas *= (0.45 + 0.75 * direct)[:, None]
    return photograph(rng, canvas.reshape(*size, 3))


def _sees(solids: Sequence[Solid], origin: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether nothing stands between ``origin`` (3,) and each of the points (3, N), which lie on surfaces."""
    return cast(solids, origin, points - origin[:, None])[0] > 1 - 1e-3
