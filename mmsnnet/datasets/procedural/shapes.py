"""Scenes of flat shapes before a textured background, as many classes of them as a set needs.

The seven outlines are the classes of the quickstart's set: there the hue that most shapes of a class lean to gives a
first hint, but some have any colour, and textures are drawn alike for all, so that beyond the hint only the outline
tells. Sets with more classes tell them by outline, hue and texture together. Irregular blobs of any colour, sizes,
angles, overlaps and light belong to no class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmsnnet.datasets.procedural.textures import colour, photograph, texture

MIN_SIDE = 32
"""The shortest side, in pixels, at which the smallest shapes can still be told apart."""
HUE_SHARE, HUE_SPREAD = 0.9, 0.03
"""How many shapes have the hue that their class leans to, and how far around it, in turns."""


# A shape is the set of points (u, v) of its own frame that lie inside; the sizes make the areas alike.
def _inside_disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u**2 + v**2 <= 0.85**2


def _inside_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) <= 0.75


def _inside_triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u) * np.sqrt(3) / 2 + v / 2, -v) <= 0.55


def _inside_ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    squared = u**2 + v**2
    return (squared <= 1) & (squared >= 0.6**2)


def _inside_cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.maximum(abs(u), abs(v)) <= 0.95) & (np.minimum(abs(u), abs(v)) <= 0.28)


def _inside_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tip, notch, half = 1.15, 0.48, np.pi / 5
    # The angle to the nearest of five tips leaves one edge to test, from (tip, 0) to the notch.
    angle = abs((np.arctan2(v, u) + half) % (2 * half) - half)
    distance = np.hypot(u, v)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    return (x - tip) * notch * np.sin(half) <= y * (notch * np.cos(half) - tip)


def _inside_bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (abs(u) <= 1.2) & (abs(v) <= 0.25)


_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": _inside_disc,
    "square": _inside_square,
    "triangle": _inside_triangle,
    "ring": _inside_ring,
    "cross": _inside_cross,
    "star": _inside_star,
    "bar": _inside_bar,
}
OUTLINES = tuple(_INSIDE)
CLASSES = ("background", *OUTLINES)
"""The classes of the quickstart's set."""
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
_REACH = 1.7  # no figure extends further than this from the origin of its frame, stretching included
_SAMPLES = 3  # per pixel and direction, for smooth edges
_HUES = 5
_TEXTURES = ("plain", "stripes", "checks", "dots", "noise")
MAX_LOOKS = len(OUTLINES) * _HUES * len(_TEXTURES)


@dataclass(frozen=True)
class Look:
    """What tells a class: its outline, its hue in turns, and its texture. Without a texture of its own, the hue is no
    more than a hint."""

    outline: str
    hue: float
    texture: str | None = None


SHAPES = tuple(Look(outline, k / len(OUTLINES)) for k, outline in enumerate(OUTLINES))
"""The looks of the quickstart's classes but the background."""


def distinct_looks(count: int) -> tuple[Look, ...]:
    """The first ``count``, 175 at the most, of the looks that differ in outline, hue or texture; neighbours differ in
    outline and hue."""
    if not 1 <= count <= MAX_LOOKS:
        raise ValueError(f"there are from 1 to {MAX_LOOKS} distinct looks, asked for {count}")
    # 7 outlines and 5 hues have no common divisor: each of their 35 pairs comes once before the texture changes.
    pairs = len(OUTLINES) * _HUES
    return tuple(
        Look(OUTLINES[k % len(OUTLINES)], k % _HUES / _HUES, _TEXTURES[k // pairs % len(_TEXTURES)])
        for k in range(count)
    )


@dataclass(frozen=True)
class Figure:
    """One outline, placed in the image: ``centre`` (y, x) and ``radius`` in pixels, ``angle`` in radians. A blob has no
    ``outline``."""

    outline: str | None
    centre: tuple[float, float]
    radius: float
    angle: float
    stretch: float
    waves: tuple[tuple[int, float, float], ...] = ()
    """A blob's outline: frequency, amplitude and phase of what is added to its radius."""

    def inside(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        if self.outline is not None:
            return _INSIDE[self.outline](u, v)
        angle = np.arctan2(v, u)
        return np.hypot(u, v) <= 0.75 + sum(a * np.cos(k * angle + phase) for k, a, phase in self.waves)

    def draw(self, size: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
        """The window of an image of ``size`` in which the figure lies, and the share of each of its pixels (h, w) that
        it covers."""
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
    """A shape (``label`` from 1: look ``label - 1``), a crowd of small ones of one class, or a blob (``label`` 0)."""

    label: int
    figures: tuple[Figure, ...]

    @property
    def is_crowd(self) -> bool:
        return len(self.figures) > 1


@dataclass(frozen=True)
class Scene:
    """A picture and what is seen where.

    ``image`` is RGB (H, W, 3), uint8; ``things`` go from the farthest to the nearest; ``owners`` (H, W) has, for each
    pixel, the index in ``things`` of the one that is seen there, -1 for the background.
    """

    image: np.ndarray
    things: tuple[Thing, ...]
    owners: np.ndarray

    def labels(self, blobs: int = 0) -> np.ndarray:
        """The classes (H, W), uint8: 0 for the background, else the things' labels, and ``blobs`` for the blobs."""
        # The last entry is what index -1 finds.
        table = [thing.label or blobs for thing in self.things] + [0]
        return np.array(table, np.uint8)[self.owners]


def make_scene(
    rng: np.random.Generator, size: tuple[int, int], looks: Sequence[Look] = SHAPES, crowd_share: float = 0.0
) -> Scene:
    """Draws a scene of ``size`` (H, W) with several shapes of any of the classes that ``looks`` describe; the share
    ``crowd_share`` of them are crowds.

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
    """Draws a scene of ``size`` (H, W) with one large shape, label 1, that has this look.

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
    """Raises a ValueError unless ``size`` is a height and a width of at least ``MIN_SIDE``."""
    if len(size) != 2 or min(size) < MIN_SIDE:
        raise ValueError(
            f"size is height and width, each at least {MIN_SIDE} pixels; got {' x '.join(str(side) for side in size)}"
        )


def _backdrop(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return colour(rng, texture(rng, size), contrast=rng.uniform(20, 120))


def _place_things(rng: np.random.Generator, size: tuple[int, int], looks: Sequence[Look]) -> list[Thing]:
    """What the scene holds, from the farthest to the nearest; as many for each square of the shorter side."""
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
    """Small copies of a shape, crowded together in its place."""
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
    """Paints the things over the canvas (H, W, 3), in their order, and takes the picture."""
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
    """The colours (h, w, 3) of a figure with this look, or of a blob; not so near the colour ``under`` it that it could
    not be seen at all."""
    hue, leans = (look.hue if look else 0) + rng.normal(0, HUE_SPREAD), rng.random() < HUE_SHARE
    own = look.texture if look else None
    pattern = texture(rng, size, own)
    while True:
        # A texture that tells the class must be plain to see.
        contrast = rng.uniform(60, 110) if own else rng.uniform(10, 60)
        colours = colour(rng, pattern, contrast, hue % 1 if look and (own or leans) else None)
        if np.linalg.norm(colours.mean(axis=(0, 1)) - under) > 45:
            return colours
