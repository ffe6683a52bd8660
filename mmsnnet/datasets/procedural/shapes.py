"""Scenes of flat shapes on a textured background, with any number of classes up to 175.

In the quickstart's set, each of the seven outlines is a class. Most shapes of a class have its hue, some have a random
colour, and textures are the same for all classes, so only the outline identifies a class. Sets with more classes
combine outline, hue and texture. Irregular blobs of random colour belong to no class. Sizes, angles, overlaps and light
are random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmsnnet.datasets.procedural.textures import colour, photograph, texture

MIN_SIDE = 32
"""The shortest side, in pixels, at which the smallest shapes can still be distinguished."""
HUE_SHARE, HUE_SPREAD = 0.9, 0.03
"""Share of shapes with the hue of their class, and its standard deviation (hues run from 0 to 1)."""


def _inside_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tip, notch, half = 1.15, 0.48, np.pi / 5
    # By symmetry, the angle to the nearest of five tips leaves one edge to test, from (tip, 0) to the notch.
    angle = abs((np.arctan2(v, u) + half) % (2 * half) - half)
    distance = np.hypot(u, v)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    return (x - tip) * notch * np.sin(half) <= y * (notch * np.cos(half) - tip)


# Each function tests points (u, v) in the frame of a shape. The sizes give all shapes about the same area.
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: u**2 + v**2 <= 0.85**2,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.75,
    "triangle": lambda u, v: np.maximum(abs(u) * np.sqrt(3) / 2 + v / 2, -v) <= 0.55,
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.6**2),
    "cross": lambda u, v: (np.maximum(abs(u), abs(v)) <= 0.95) & (np.minimum(abs(u), abs(v)) <= 0.28),
    "star": _inside_star,
    "bar": lambda u, v: (abs(u) <= 1.2) & (abs(v) <= 0.25),
}
OUTLINES = tuple(_INSIDE)
CLASSES = ("background", *OUTLINES)
"""Classes of the quickstart's set."""
PALETTE = (
    (80, 80, 80),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_REACH = 1.7  # upper bound of a figure's extent in its frame, stretching included
_SAMPLES = 3  # per pixel and direction, for smooth edges
_HUES = 5
_TEXTURES = ("plain", "stripes", "checks", "dots", "noise")
MAX_LOOKS = len(OUTLINES) * _HUES * len(_TEXTURES)


@dataclass(frozen=True)
class Look:
    """Appearance of a class: outline, hue (0 to 1) and texture. Without a texture, some shapes have another hue."""

    outline: str
    hue: float
    texture: str | None = None


SHAPES = tuple(Look(outline, k / len(OUTLINES)) for k, outline in enumerate(OUTLINES))
"""Looks of the quickstart's classes except the background."""


def distinct_looks(count: int) -> tuple[Look, ...]:
    """Return ``count`` looks, at most 175, that differ in outline, hue or texture.

    Neighbours differ in outline and hue.
    """
    if not 1 <= count <= MAX_LOOKS:
        raise ValueError(f"the number of distinct looks must be 1 to {MAX_LOOKS}, got {count}")
    # 7 outlines and 5 hues have no common divisor, so all 35 pairs occur before the texture changes.
    pairs = len(OUTLINES) * _HUES
    return tuple(
        Look(OUTLINES[k % len(OUTLINES)], k % _HUES / _HUES, _TEXTURES[k // pairs % len(_TEXTURES)])
        for k in range(count)
    )


@dataclass(frozen=True)
class Figure:
    """Outline placed in the image: ``centre`` (y, x) and ``radius`` in pixels, ``angle`` in radians.

    A blob has no ``outline``.
    """

    outline: str | None
    centre: tuple[float, float]
    radius: float
    angle: float
    stretch: float
    waves: tuple[tuple[int, float, float], ...] = ()
    """Outline of a blob: frequency, amplitude and phase of each wave on its radius."""

    def inside(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        if self.outline is not None:
            return _INSIDE[self.outline](u, v)
        angle = np.arctan2(v, u)
        return np.hypot(u, v) <= 0.75 + sum(a * np.cos(k * angle + phase) for k, a, phase in self.waves)

    def draw(self, size: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
        """Return the figure's window in an image of ``size``, and its coverage (h, w) of each pixel there, 0 to 1."""
        reach = self.radius * _REACH
        rows, columns = (
            slice(max(0, int(c - reach)), min(side, int(c + reach) + 2))
            for c, side in zip(self.centre, size, strict=True)
        )
        y, x = (
            (np.arange(s.start * _SAMPLES, s.stop * _SAMPLES, dtype=np.float32) + 0.5) / _SAMPLES - c
            for s, c in zip((rows, columns), self.centre, strict=True)
        )
        cos, sin = np.cos(self.angle) / self.radius, np.sin(self.angle) / self.radius
        u = (cos * x + sin * y[:, None]) / self.stretch
        v = (cos * y[:, None] - sin * x) * self.stretch
        hits = self.inside(u, v).reshape(rows.stop - rows.start, _SAMPLES, columns.stop - columns.start, _SAMPLES)
        return (rows, columns), hits.mean(axis=(1, 3), dtype=np.float32)


@dataclass(frozen=True)
class Thing:
    """Shape (``label`` from 1, with look ``label - 1``), crowd of small shapes of one class, or blob (``label`` 0)."""

    label: int
    figures: tuple[Figure, ...]

    @property
    def is_crowd(self) -> bool:
        return len(self.figures) > 1


@dataclass(frozen=True)
class Scene:
    """Picture with the visible thing of each pixel.

    ``image`` is RGB (H, W, 3), uint8. ``things`` are ordered from the farthest to the nearest. ``owners`` (H, W) has
    the index in ``things`` of the visible thing, -1 for the background.
    """

    image: np.ndarray
    things: tuple[Thing, ...]
    owners: np.ndarray

    def labels(self, blobs: int = 0) -> np.ndarray:
        """Classes (H, W), uint8: 0 for the background, ``blobs`` for blobs, else the labels of the things."""
        # Index -1, the background, takes the last entry.
        table = [thing.label or blobs for thing in self.things] + [0]
        return np.array(table, np.uint8)[self.owners]


def make_scene(
    rng: np.random.Generator, size: tuple[int, int], looks: Sequence[Look] = SHAPES, crowd_share: float = 0.0
) -> Scene:
    """Draw a scene of ``size`` (H, W) with several shapes of the classes in ``looks``.

    A shape becomes a crowd with probability ``crowd_share``.

    Raises:
        ValueError: a side is below ``MIN_SIDE``.
    """
    check_size(size)
    canvas = _backdrop(rng, size)
    things = _place_things(rng, size, looks)
    if crowd_share:
        things = [_crowd(rng, t, size) if t.label and rng.random() < crowd_share else t for t in things]
    return _paint(rng, canvas, things, looks)


def make_portrait(rng: np.random.Generator, size: tuple[int, int], look: Look) -> Scene:
    """Draw a scene of ``size`` (H, W) with one large shape of this look, label 1.

    Raises:
        ValueError: a side is below ``MIN_SIDE``.
    """
    check_size(size)
    canvas = _backdrop(rng, size)
    blobs = [_place_figure(rng, None, size) for _ in range(int(rng.integers(3)))]
    centre = (rng.uniform(0.4, 0.6) * size[0], rng.uniform(0.4, 0.6) * size[1])
    figure = replace(_place_figure(rng, look.outline, size), centre=centre, radius=rng.uniform(0.25, 0.4) * min(size))
    return _paint(rng, canvas, [*(Thing(0, (blob,)) for blob in blobs), Thing(1, (figure,))], (look,))


def check_size(size: tuple[int, int]) -> None:
    """Raise ValueError unless ``size`` is a height and a width of at least ``MIN_SIDE``."""
    if len(size) != 2 or min(size) < MIN_SIDE:
        raise ValueError(
            f"size must be height and width, each at least {MIN_SIDE} pixels; got {' x '.join(map(str, size))}"
        )


def _backdrop(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return colour(rng, texture(rng, size), contrast=rng.uniform(20, 120))


def _place_things(rng: np.random.Generator, size: tuple[int, int], looks: Sequence[Look]) -> list[Thing]:
    """Place things, from the farthest to the nearest. Their number grows with the ratio of the image's sides."""
    squares = size[0] * size[1] / min(size) ** 2
    shapes, blobs = round(rng.uniform(3, 7) * squares), round(rng.uniform(1, 3) * squares)
    labels = [0] * blobs + [1 + int(rng.integers(len(looks))) for _ in range(shapes)]
    rng.shuffle(labels)
    outlines = [looks[label - 1].outline if label else None for label in labels]
    return [Thing(label, (_place_figure(rng, outline, size),)) for label, outline in zip(labels, outlines, strict=True)]


def _place_figure(rng: np.random.Generator, outline: str | None, size: tuple[int, int]) -> Figure:
    centre = (rng.uniform(0.04, 0.96) * size[0], rng.uniform(0.04, 0.96) * size[1])
    radius = min(size) * np.exp(rng.uniform(np.log(0.16), np.log(0.32)))
    angle = rng.uniform(0, 2 * np.pi)
    stretch = np.exp(rng.uniform(-1, 1) * np.log(1.25))
    waves = () if outline else tuple((k, rng.uniform(0.08, 0.2), rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    return Figure(outline, centre, radius, angle, stretch, waves)


def _crowd(rng: np.random.Generator, thing: Thing, size: tuple[int, int]) -> Thing:
    """Replace a shape by small copies around its centre."""
    (figure,) = thing.figures
    copies = []
    for _ in range(int(rng.integers(4, 8))):
        y, x = (
            float(np.clip(c + rng.normal(0, figure.radius), 0, side))
            for c, side in zip(figure.centre, size, strict=True)
        )
        copies.append(replace(figure, centre=(y, x), radius=0.4 * figure.radius, angle=rng.uniform(0, 2 * np.pi)))
    return replace(thing, figures=tuple(copies))


def _paint(rng: np.random.Generator, canvas: np.ndarray, things: Sequence[Thing], looks: Sequence[Look]) -> Scene:
    """Paint the things over the canvas (H, W, 3), in order, and photograph it."""
    size = canvas.shape[:2]
    owners = np.full(size, -1, np.int16)
    for index, thing in enumerate(things):
        look = looks[thing.label - 1] if thing.label else None
        for figure in thing.figures:
            window, coverage = figure.draw(size)
            if not coverage.any():
                continue
            under = canvas[window]
            over = _dress(rng, coverage.shape, under[coverage > 0].mean(axis=0), look)
            canvas[window] = under + coverage[..., None] * (over - under)
            owners[window][coverage >= 0.5] = index
    return Scene(photograph(rng, canvas), tuple(things), owners)


def _dress(rng: np.random.Generator, size: tuple[int, int], under: np.ndarray, look: Look | None) -> np.ndarray:
    """Draw colours (h, w, 3) of a figure, or of a blob without look, that differ from the colour ``under`` it."""
    hue, has_class_hue = (look.hue if look else 0) + rng.normal(0, HUE_SPREAD), rng.random() < HUE_SHARE
    class_texture = look.texture if look else None
    pattern = texture(rng, size, class_texture)
    while True:
        # A texture that identifies the class needs a high contrast.
        contrast = rng.uniform(60, 110) if class_texture else rng.uniform(10, 60)
        colours = colour(rng, pattern, contrast, hue % 1 if look and (class_texture or has_class_hue) else None)
        if np.linalg.norm(colours.mean(axis=(0, 1)) - under) > 45:
            return colours
