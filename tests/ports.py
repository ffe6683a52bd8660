"""Ports for servers that tests start."""

import random

from mmsnnet.cli import ports


def free_port() -> int:
    """A free port, outside the ranges from which systems serve connections and Ray its workers."""
    return ports.free_port("127.0.0.1", random.SystemRandom().sample(range(20_000, 32_000), 50))
