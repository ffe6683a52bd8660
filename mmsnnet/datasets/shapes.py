"""A procedural set for semantic segmentation, written in the folders and file names of the real sets.

A scene shows seven shapes before a textured background. The hue that most shapes of a class lean to gives a first hint;
but some have any colour, so have the irregular blobs that count as background, and light, textures, sizes, angles and
overlaps are drawn alike for all: beyond the hint, only the outline tells. Image ``i`` of a split is a pure function of
(seed, split, ``i``), so that a longer run only adds images.
"""

from __future__ import annotations

import colorsys
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageFilter

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross", "star", "bar")
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
SPLITS = ("train", "val")
HUE_SHARE, HUE_SPREAD = 0.9, 0.03
"""How many shapes have the hue that their class leans to, and how far around it, in turns."""
MIN_SIDE = 32
"""The shortest side, in pixels, at which the smallest shapes can still be told apart."""


@dataclass(frozen=True)
class SemanticLayout:
    """Where a semantic segmentation set keeps its images and label maps, and what its labels start from.

    ``folders`` are the folders of ``SPLITS``, in that order, below ``images/`` and ``annotations/``; ``stems`` are the
    file names without suffix, to be formatted with the image's number, from 1.
    """

    folders: tuple[str, str]
    stems: tuple[str, str]
    label_suffix: str = ".png"
    first_label: int = 0

    parts: ClassVar[tuple[str, str]] = ("images", "annotations")

    def make_folders(self, root: Path) -> None:
        for part in self.parts:
            for folder in self.folders:
                (root / part / folder).mkdir(parents=True)

    def write(self, root: Path, split: str, index: int, image: np.ndarray, labels: np.ndarray) -> None:
        """Writes image ``index`` (from 0) of ``split`` and its label map below ``root``."""
        which = SPLITS.index(split)
        folder, stem = self.folders[which], self.stems[which].format(index + 1)
        Image.fromarray(image).save(root / "images" / folder / f"{stem}.jpg", quality=95, subsampling=0)
        # Grey, not indexed, colours: OpenCV would read the colours of an indexed PNG instead of its labels.
        label_map = Image.fromarray(labels + np.uint8(self.first_label))
        label_map.save(root / "annotations" / folder / f"{stem}{self.label_suffix}")


LAYOUTS = {
    # ADE20K and COCO-Stuff 10k keep 0 for what has no label: to be read with reduce_zero_label=True.
    "ade20k": SemanticLayout(("training", "validation"), ("ADE_train_{:08d}", "ADE_val_{:08d}"), first_label=1),
    "coco_stuff10k": SemanticLayout(
        ("train2014", "test2014"),
        ("COCO_train2014_{:012d}", "COCO_test2014_{:012d}"),
        label_suffix="_labelTrainIds.png",
        first_label=1,
    ),
    "camvid": SemanticLayout(("train", "val"), ("train_{:06d}", "val_{:06d}")),
}


def write_shapes(
    out: str | Path,
    layout: str,
    train: int = 200,
    val: int = 50,
    size: tuple[int, int] = (128, 128),
    seed: int = 0,
    on_image: Callable[[], None] | None = None,
) -> Path:
    """Writes ``train`` + ``val`` scenes of ``size`` (H, W) below the folder ``out`` and returns its absolute path.

    The set comes into being in a temporary folder beside ``out`` and takes its name at the end: what is called ``out``
    is always complete. ``on_image`` is called after each image.

    Raises:
        FileExistsError: ``out`` is there already and is not an empty folder; nothing in it is changed.
        ValueError: an unknown layout, a count below 1, a side below ``MIN_SIDE``, a negative seed, or an ``out`` that
            cannot be renamed.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: there are {', '.join(LAYOUTS)}")
    for split, count in zip(SPLITS, (train, val), strict=True):
        if count < 1:
            raise ValueError(f"the {split} split needs at least 1 image, got {count}")
    _check_size(size)
    _check_seed(seed)
    out = Path(out).resolve()
    _check_free(out)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        # One level down, because the temporary folder itself is readable by its owner alone.
        root = Path(temporary, out.name)
        LAYOUTS[layout].make_folders(root)
        for split, count in zip(SPLITS, (train, val), strict=True):
            for index in range(count):
                image, labels = make_scene(scene_rng(seed, split, index), size)
                LAYOUTS[layout].write(root, split, index, image, labels)
                if on_image is not None:
                    on_image()
        _check_free(out)
        if out.exists():
            out.rmdir()
        root.rename(out)
    return out


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The source of all that is random in image ``index`` (from 0) of ``split``.

    Raises:
        ValueError: an unknown split, or a negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")
    _check_seed(seed)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index)))


def make_scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws one scene of ``size`` (H, W): the RGB image (H, W, 3) and the labels (H, W), indices into ``CLASSES``; both
    are uint8.

    Raises:
        ValueError: a side is below ``MIN_SIDE``.
    """
    _check_size(size)
    canvas = _colour(rng, _texture(rng, size), contrast=rng.uniform(20, 120))
    labels = np.zeros(size, np.uint8)
    for figure in _place_figures(rng, size):
        window, coverage = figure.draw(size)
        if not coverage.any():
            continue
        under = canvas[window]
        hue = _hue_of(rng, figure.label)
        over = _colour_apart_from(rng, _texture(rng, coverage.shape), under[coverage > 0].mean(axis=0), hue)
        canvas[window] = under + coverage[..., None] * (over - under)
        labels[window][coverage >= 0.5] = figure.label
    return _photograph(rng, canvas), labels


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < MIN_SIDE:
        raise ValueError(
            f"size is height and width, each at least {MIN_SIDE} pixels; got {' x '.join(str(side) for side in size)}"
        )


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more, got {seed}")


def _check_free(out: Path) -> None:
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        kind = "a folder that is not empty" if out.is_dir() else "a file"
        raise FileExistsError(f"{out} is {kind}: nothing was written. Remove it or name another output folder")
    if out.is_mount():
        raise ValueError(f"{out} is a mount point, which cannot be replaced by a rename: name a folder inside it")


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


_INSIDE = (
    _inside_disc,
    _inside_square,
    _inside_triangle,
    _inside_ring,
    _inside_cross,
    _inside_star,
    _inside_bar,
)
_REACH = 1.7  # no figure extends further than this from the origin of its frame, stretching included
_SAMPLES = 3  # per pixel and direction, for smooth edges


@dataclass(frozen=True)
class _Figure:
    """A shape (``label`` from 1) or a blob that belongs to the background (``label`` 0), placed in the image."""

    label: int
    centre: tuple[float, float]
    radius: float
    angle: float
    stretch: float
    waves: tuple[tuple[int, float, float], ...] = ()
    """A blob's outline: frequency, amplitude and phase of what is added to its radius."""

    def inside(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        if self.label:
            return _INSIDE[self.label - 1](u, v)
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


def _place_figures(rng: np.random.Generator, size: tuple[int, int]) -> list[_Figure]:
    """What the scene holds, from the farthest to the nearest; as many for each square of the shorter side."""
    short = min(size)
    squares = size[0] * size[1] / short**2
    shapes, blobs = round(rng.uniform(3, 7) * squares), round(rng.uniform(1, 3) * squares)
    figures = [0] * blobs + [1 + int(rng.integers(len(_INSIDE))) for _ in range(shapes)]
    rng.shuffle(figures)
    return [_place_figure(rng, label, size, short) for label in figures]


def _place_figure(rng: np.random.Generator, label: int, size: tuple[int, int], short: int) -> _Figure:
    centre = (rng.uniform(0.04, 0.96) * size[0], rng.uniform(0.04, 0.96) * size[1])
    radius = short * np.exp(rng.uniform(np.log(0.16), np.log(0.32)))
    angle = rng.uniform(0, 2 * np.pi)
    stretch = np.exp(rng.uniform(-1, 1) * np.log(1.25))
    waves = tuple((k, rng.uniform(0.08, 0.2), rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5)) if label == 0 else ()
    return _Figure(label, centre, radius, angle, stretch, waves)


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A pattern (h, w) with values from 0 to 1."""
    kind = _TEXTURES[rng.integers(len(_TEXTURES))]
    return kind(rng, *_turned_axes(rng, size))


def _turned_axes(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The pixels' coordinates (h, w) along a random direction and across it."""
    angle = rng.uniform(0, 2 * np.pi)
    y = np.arange(size[0], dtype=np.float32)[:, None]
    x = np.arange(size[1], dtype=np.float32)
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _plain(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    return np.zeros_like(along)


def _gradient(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    low, high = along.min(), along.max()
    return (along - low) / max(high - low, 1)


def _stripes(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    wave = np.sin(along * (2 * np.pi / rng.uniform(4, 16)) + rng.uniform(0, 2 * np.pi))
    return np.clip(wave * rng.uniform(0.5, 3) + 0.5, 0, 1)


def _checks(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    cell = rng.uniform(3, 10)
    offset = rng.uniform(0, 2, 2)
    return (np.floor(along / cell + offset[0]) + np.floor(across / cell + offset[1])) % 2


def _dots(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    cell = rng.uniform(5, 12)
    offset = rng.uniform(0, 1, 2)
    u, v = (along / cell + offset[0]) % 1 - 0.5, (across / cell + offset[1]) % 1 - 0.5
    return np.clip((rng.uniform(0.2, 0.4) - np.hypot(u, v)) * cell + 0.5, 0, 1)


def _noise(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Value noise: random grids, blown up smoothly and added; the coarser the grid, the greater its share."""
    height, width = along.shape
    cell, total, weight = rng.uniform(6, 40), np.zeros_like(along), 0.0
    while cell >= 2:
        grid = rng.random((int(height / cell) + 2, int(width / cell) + 2), dtype=np.float32)
        blown_up = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += cell * np.asarray(blown_up)
        weight += cell
        cell /= 2.5
    return np.clip((total / weight - 0.5) * 2 + 0.5, 0, 1)


_TEXTURES = (_plain, _gradient, _stripes, _checks, _dots, _noise, _noise)


def _hue_of(rng: np.random.Generator, label: int) -> float | None:
    """The hue that a shape leans to, in turns; None, for any colour, for blobs and for some of the shapes."""
    hue, leans = (label - 1) / len(_INSIDE) + rng.normal(0, HUE_SPREAD), rng.random() < HUE_SHARE
    return hue % 1 if label and leans else None


def _colour(rng: np.random.Generator, texture: np.ndarray, contrast: float, hue: float | None = None) -> np.ndarray:
    """The texture (h, w) between two colours that lie ``contrast`` apart, about one of this ``hue`` if it is given."""
    base, step = rng.uniform(20, 235, 3), rng.normal(size=3)
    if hue is not None:
        base = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 1), rng.uniform(0.5, 1)))
    step *= contrast / np.linalg.norm(step)
    return np.clip(base + (texture[..., None] - texture.mean()) * step, 0, 255).astype(np.float32)


def _colour_apart_from(
    rng: np.random.Generator, texture: np.ndarray, under: np.ndarray, hue: float | None
) -> np.ndarray:
    """As :func:`_colour`, but not so near the colour ``under`` that the figure could not be seen at all."""
    while True:
        colours = _colour(rng, texture, rng.uniform(10, 60), hue)
        if np.linalg.norm(colours.mean(axis=(0, 1)) - under) > 45:
            return colours


def _photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """The canvas (H, W, 3) under uneven coloured light, out of focus, with sensor noise; uint8."""
    ramp = _gradient(rng, *_turned_axes(rng, canvas.shape[:2]))
    light = 1 + rng.uniform(0, 0.6) * (ramp - 0.5)
    tint = rng.uniform(0.85, 1.15, 3) * rng.uniform(0.7, 1.15)
    lit = 255 * np.clip(canvas * (light[..., None] * tint) / 255, 0, 1) ** rng.uniform(0.8, 1.3)
    picture = Image.fromarray(lit.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(1, 12)
    return np.clip(np.asarray(picture) + noise, 0, 255).round().astype(np.uint8)
