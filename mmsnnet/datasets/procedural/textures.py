"""Textures of drawn surfaces: patterns, colours, and a simulated camera.

A pattern takes the coordinates of points along and across its direction, in pixels or a unit of about that size, and
returns values from 0 to 1.
"""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageFilter


def plain(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    return np.zeros_like(along)


def gradient(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    low, high = along.min(), along.max()
    return (along - low) / max(high - low, 1)


def stripes(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    wave = np.sin(along * (2 * np.pi / rng.uniform(4, 16)) + rng.uniform(0, 2 * np.pi))
    return np.clip(wave * rng.uniform(0.5, 3) + 0.5, 0, 1)


def checks(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    cell = rng.uniform(3, 10)
    offset = rng.uniform(0, 2, 2)
    return (np.floor(along / cell + offset[0]) + np.floor(across / cell + offset[1])) % 2


def dots(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    cell = rng.uniform(5, 12)
    offset = rng.uniform(0, 1, 2)
    u, v = (along / cell + offset[0]) % 1 - 0.5, (across / cell + offset[1]) % 1 - 0.5
    return np.clip((rng.uniform(0.2, 0.4) - np.hypot(u, v)) * cell + 0.5, 0, 1)


def noise(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Value noise over the pixels (h, w): a sum of smoothly upsampled random grids, weighted by their cell size.

    Only the shape of the coordinates matters.
    """
    height, width = along.shape
    cell, total, weight = rng.uniform(6, 40), np.zeros_like(along), 0.0
    while cell >= 2:
        grid = rng.random((int(height / cell) + 2, int(width / cell) + 2), dtype=np.float32)
        upsampled = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += cell * np.asarray(upsampled)
        weight += cell
        cell /= 2.5
    return np.clip((total / weight - 0.5) * 2 + 0.5, 0, 1)


PATTERNS = {pattern.__name__: pattern for pattern in (plain, gradient, stripes, checks, dots, noise)}
_DRAWN_FROM = (*PATTERNS, "noise")  # noise twice as often


def texture(rng: np.random.Generator, size: tuple[int, int], pattern: str | None = None) -> np.ndarray:
    """Draw a pattern (h, w) at a random angle: the named one, or a random one."""
    drawn = _DRAWN_FROM[rng.integers(len(_DRAWN_FROM))]
    return PATTERNS[pattern or drawn](rng, *_rotated_axes(rng, size))


def colour(rng: np.random.Generator, texture: np.ndarray, contrast: float, hue: float | None = None) -> np.ndarray:
    """Colour a texture (...,) as RGB (..., 3), between two random colours at distance ``contrast``.

    ``hue``, from 0 to 1, sets the hue of their middle.
    """
    base, step = rng.uniform(20, 235, 3), rng.normal(size=3)
    if hue is not None:
        base = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 1), rng.uniform(0.5, 1)))
    step *= contrast / np.linalg.norm(step)
    return np.clip(base + (texture[..., None] - texture.mean()) * step, 0, 255).astype(np.float32)


def photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Photograph the canvas (H, W, 3), from 0 to 255: uneven coloured light, blur, sensor noise; returns uint8."""
    ramp = gradient(rng, *_rotated_axes(rng, canvas.shape[:2]))
    light = 1 + rng.uniform(0, 0.6) * (ramp - 0.5)
    tint = rng.uniform(0.85, 1.15, 3) * rng.uniform(0.7, 1.15)
    lit = 255 * np.clip(canvas * (light[..., None] * tint) / 255, 0, 1) ** rng.uniform(0.8, 1.3)
    picture = Image.fromarray(lit.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(1, 12)
    return np.clip(np.asarray(picture) + grain, 0, 255).round().astype(np.uint8)


def _rotated_axes(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (h, w) along a random direction and across it."""
    angle = rng.uniform(0, 2 * np.pi)
    y = np.arange(size[0], dtype=np.float32)[:, None]
    x = np.arange(size[1], dtype=np.float32)
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
