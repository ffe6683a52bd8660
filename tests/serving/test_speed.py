"""What a server learns of its device: slowness, and the costs of kinds of images."""

import numpy as np
import pytest

from mmsnnet.serving.recent import MEMORY_MS, MOST, QUANTILE
from mmsnnet.serving.speed import KINDS, Speed


def test_slowness_is_a_high_quantile_and_the_mean_of_the_last_batches() -> None:
    rng, speed, ratios, now = np.random.default_rng(0), Speed(), [], 0.0
    assert speed.slowness(now) == (1, 1)
    for ratio in rng.lognormal(0, 0.5, 200).tolist():
        now += rng.uniform(0, 10)
        speed.observe(None, ratio, now)
        ratios = [*ratios, ratio][-MOST:]
        assert speed.slowness(now) == pytest.approx((np.quantile(ratios, QUANTILE), np.mean(ratios)))


def test_slowness_is_forgotten() -> None:
    speed = Speed()
    speed.observe(None, 3.0, 0.0)
    speed.observe(None, 2.0, 5000.0)
    assert speed.slowness(MEMORY_MS - 1)[1] == 2.5
    assert speed.slowness(MEMORY_MS) == (2, 2)
    assert speed.slowness(5000 + MEMORY_MS) == (1, 1)


def test_slowness_is_that_of_the_device_for_images_of_all_kinds() -> None:
    """A kind that costs four times as much says nothing of the device, before its cost is known."""
    speed = Speed("base")
    speed.observe("large", 4.0, 0.0)
    assert speed.slowness(0.0) == (1, 1) and speed.cost("large", 0.0) == 4
    speed.observe("large", 8.0, 1.0)
    assert speed.slowness(1.0) == (2, 2)


def test_the_base_kind_costs_one_forever() -> None:
    speed = Speed("base")
    for now in range(100):
        speed.observe("base", 5.0, float(now))
    assert speed.cost("base", 100.0) == speed.cost("base", 1e9) == 1


def test_the_cost_of_a_kind_is_learned_beside_the_slowness() -> None:
    """From batches of several kinds on a device that is slow, and noisy."""
    rng, true = np.random.default_rng(0), {"base": 1.0, "small": 0.3, "large": 4.0}
    speed, now = Speed("base"), 0.0
    for _ in range(300):
        now += 10
        kind = rng.choice(list(true))
        speed.observe(kind, 1.5 * true[kind] * rng.lognormal(0, 0.05), now)
    for kind, cost in true.items():
        assert speed.cost(kind, now) == pytest.approx(cost, rel=0.15)
        assert speed.cost(kind, now) * speed.slowness(now)[1] == pytest.approx(1.5 * cost, rel=0.1)


def test_a_cost_is_forgotten_and_learned_anew() -> None:
    speed = Speed("base")
    assert speed.cost("large", 0.0) is None
    speed.observe("large", 4.0, 0.0)
    assert speed.cost("large", MEMORY_MS - 1) == 4
    assert speed.cost("large", MEMORY_MS) is None
    speed.observe("large", 2.0, MEMORY_MS)
    assert speed.cost("large", MEMORY_MS) == 2


def test_kinds_seen_long_ago_make_room() -> None:
    speed = Speed("base")
    for kind in range(KINDS):
        speed.observe(kind, 2.0, 0.0)
    speed.observe(0, 2.0, 1.0)
    speed.observe("new", 2.0, 2.0)
    assert speed.cost(1, 2.0) is None
    assert speed.cost(0, 2.0) == speed.cost("new", 2.0) == 2
