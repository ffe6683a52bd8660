"""Random states as arithmetic: whoever knows where a run stands knows what it draws next, so that nothing is saved."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def hashed(*place: int | str) -> int:
    """A seed of 63 bits for a place in a run, such as its seed, a rank and an iteration; places next to each other have
    unrelated seeds."""
    digest = hashlib.blake2b(":".join(map(str, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(seed: int) -> None:
    """Seeds the global generators of the CPU: Python's, numpy's and torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  what augmentations draw from
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.1 ms where there is no GPU


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restores the global generators of the CPU afterwards: Python's, numpy's and torch's."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
