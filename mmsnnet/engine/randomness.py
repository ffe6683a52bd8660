"""Random states as a function of the place in a run, so that a checkpoint need not save any."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def hashed(*place: int | str) -> int:
    """A seed of 63 bits for a place in a run, such as its seed, a rank and an iteration.

    Seeds of neighbouring places are unrelated.
    """
    digest = hashlib.blake2b(":".join(map(str, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(seed: int) -> None:
    """Seed the CPU's global generators: those of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  augmentations draw from it
    torch.default_generator.manual_seed(seed)  # without a GPU, torch.manual_seed takes 0.1 ms


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the CPU's global generators afterwards: those of Python, NumPy and torch."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
