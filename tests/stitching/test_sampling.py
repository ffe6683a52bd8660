"""Resource-constrained sampling: pure draws, uniform over bins and within them."""

from collections import Counter
from hashlib import blake2b
from itertools import pairwise

import pytest
from scipy import stats

from mmsnnet.stitching import StitchSampler, flops_bins
from mmsnnet.stitching.sampling import equal_flops

BINS = ((0, 3), (1,), (5, 2, 7, 4), (6, 8, 9))


def bins_by_loop(flops: dict[int, int], step: float) -> list[list[int]]:
    """The definition: walk up the costs, open a bin when more than ``step`` above the first of the current one."""
    order = sorted(flops.items(), key=lambda item: (item[1], item[0]))
    bins = [[order[0]]]
    for item in order[1:]:
        if item[1] - bins[-1][0][1] > step:
            bins.append([item])
        else:
            bins[-1].append(item)
    return [[id_ for id_, _ in members] for members in bins]


def draws(seed: int, n: int = 4000) -> Counter[int]:
    sampler = StitchSampler(BINS, seed=seed)
    return Counter(sampler.draw(i) for i in range(n))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_draws_are_a_function_of_seed_and_number(seed: int) -> None:
    forward = [StitchSampler(BINS, seed=seed).draw(i) for i in range(200)]
    sampler = StitchSampler(BINS, seed=seed)
    backward = [sampler.draw(i) for i in reversed(range(200))]
    assert backward[::-1] == forward
    assert [sampler.draw(i) for i in range(100, 200)] == forward[100:]


def test_seeds_and_numbers_give_different_draws() -> None:
    runs = {seed: tuple(StitchSampler(BINS, seed=seed).draw(i) for i in range(64)) for seed in range(32)}
    assert len(set(runs.values())) == 32
    # neighbouring seeds and numbers are unrelated: no run is another one shifted
    assert not any(runs[seed][1:] == runs[seed + 1][:-1] for seed in range(31))


def test_the_draw_of_a_known_seed_stays() -> None:
    """A resumed run needs the same draws from later versions of the package: BLAKE2b of 'seed:n', by hand."""
    digest = blake2b(b"7:41", digest_size=16).digest()
    which_bin = int(int.from_bytes(digest[:8], "big") / 2**64 * len(BINS))
    which = int(int.from_bytes(digest[8:], "big") / 2**64 * len(BINS[which_bin]))
    assert StitchSampler(BINS, seed=7).draw(41) == BINS[which_bin][which]


def test_each_bin_gets_the_same_flops() -> None:
    """Means are 100, 200, 400 and 1000, so the costliest bin keeps 1000 of 1700 parts of the FLOPs."""
    flops = {0: 90, 3: 110, 1: 200, 5: 400, 2: 400, 7: 400, 4: 400, 6: 1000, 8: 1000, 9: 1000}
    weights = equal_flops(BINS, flops)
    assert weights == (10000, 5000, 2500, 4286)  # 3 * 1000 / 700
    assert equal_flops(BINS[:1], flops) == (1000,)
    assert equal_flops(BINS[::3], flops) == (10000, 10000)  # two bins: as often as without weights
    assert equal_flops(BINS, flops, kept=2) == (4000, 2000, 923, 400)  # 3 * 400 / 1300
    sampler, number = StitchSampler(BINS, seed=5, weights=weights), 8000
    count = Counter(sampler.draw(i) for i in range(number))
    expected = [weight / sum(weights) * number for weight in weights]
    assert stats.chisquare([sum(count[id_] for id_ in members) for members in BINS], expected).pvalue > 1e-3
    assert stats.chisquare([count[id_] for id_ in BINS[2]]).pvalue > 1e-3


def test_equal_weights_draw_as_none(seed: int = 4) -> None:
    weighted = StitchSampler(BINS, seed, weights=(7,) * len(BINS))
    assert [weighted.draw(n) for n in range(300)] == [StitchSampler(BINS, seed).draw(n) for n in range(300)]


@pytest.mark.parametrize("weights", [(1,), (1, 1, 0, 1)])
def test_weights_fit_the_bins(weights: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="for each of 4 bins"):
        StitchSampler(BINS, weights=weights)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniform_over_bins_and_within_bins(seed: int) -> None:
    count = draws(seed)
    per_bin = [sum(count[id_] for id_ in members) for members in BINS]
    assert stats.chisquare(per_bin).pvalue > 1e-3
    for members in BINS:
        if len(members) > 1:
            assert stats.chisquare([count[id_] for id_ in members]).pvalue > 1e-3
    assert set(count) == {id_ for members in BINS for id_ in members}


def test_consecutive_draws_are_independent() -> None:
    sampler = StitchSampler(((0,), (1,), (2,)), seed=3)
    pairs = Counter((sampler.draw(i), sampler.draw(i + 1)) for i in range(3000))
    assert stats.chisquare([pairs[a, b] for a in range(3) for b in range(3)]).pvalue > 1e-3


def test_an_anchor_alone_in_its_bin_is_drawn_as_often_as_any_bin() -> None:
    """Bins draw anchors often; uniform draws of stitches would draw each once in 134."""
    flops = {0: 10, 1: 900, **{i: 300 + i for i in range(2, 134)}}
    bins = flops_bins(flops, step=100)
    assert bins[0] == (0,) and bins[-1] == (1,) and len(bins) == 4
    sampler = StitchSampler(bins, seed=0)
    count = Counter(sampler.draw(i) for i in range(3000))
    for id_ in (0, 1):
        assert count[id_] / 3000 == pytest.approx(1 / 4, abs=4 * (1 / 4 * 3 / 4 / 3000) ** 0.5)


@pytest.mark.parametrize("step", [0.5, 1, 3, 7.5, 10, 1000])
def test_bins_by_their_definition(step: float) -> None:
    flops = {i: (i * 37) % 61 for i in range(40)} | {40: 5, 41: 5}
    bins = flops_bins(flops, step)
    assert [list(members) for members in bins] == bins_by_loop(flops, step)
    assert sorted(id_ for members in bins for id_ in members) == list(range(42))
    for members, following in zip(bins, [*bins[1:], None], strict=True):
        first = flops[members[0]]
        assert all(flops[id_] <= first + step for id_ in members)
        assert following is None or flops[following[0]] > first + step


def test_a_bin_takes_what_costs_exactly_the_step_more() -> None:
    assert flops_bins({0: 0, 1: 10, 2: 11, 3: 21, 4: 22}, step=10) == ((0, 1), (2, 3), (4,))
    assert flops_bins({9: 7, 4: 7, 5: 1}, step=100) == ((5, 4, 9),)


@pytest.mark.parametrize("step", [0.5, 10, 1000])
def test_some_stitches_have_bins_of_their_own(step: float) -> None:
    """They divide the bins in which they would lie; costs ascend from bin to bin."""
    flops = {i: (i * 37) % 61 for i in range(40)}
    alone = (0, 5, 6, 20)
    bins = flops_bins(flops, step, alone)
    assert {(id_,) for id_ in alone} <= set(bins)
    walked = [id_ for members in bins for id_ in members]
    assert walked == sorted(flops, key=lambda id_: (flops[id_], id_))
    assert all(flops[members[-1]] <= flops[members[0]] + step for members in bins)
    for members, following in pairwise(bins):
        near = flops[following[0]] <= flops[members[0]] + step
        assert not near or members[-1] in alone or following[0] in alone
    assert flops_bins(flops, step, alone=[99]) == flops_bins(flops, step)


@pytest.mark.parametrize("step", [0, -1, -0.5])
def test_a_step_is_above_zero(step: float) -> None:
    with pytest.raises(ValueError, match=str(step)):
        flops_bins({0: 1}, step)


@pytest.mark.parametrize("bins", [(), ((0,), ())])
def test_nothing_to_draw_from(bins: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        StitchSampler(bins)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_a_step_of_several_stitches_runs_both_ends_and_draws_the_others(k: int) -> None:
    drawn = [StitchSampler(BINS, 3, stitches_per_step=k).draw(n) for n in range(6 * k)]
    one = [StitchSampler(BINS, 3).draw(n) for n in range(6 * k)]
    cheapest, costliest = 0, 9
    for step in range(6):
        first, second, *others = drawn[step * k : (step + 1) * k]
        assert (first, second) == (costliest, cheapest)
        assert others == one[step * k + 2 : (step + 1) * k]


def test_the_cheapest_and_the_costliest_are_those_of_all_bins() -> None:
    flops = {i: (i * 37) % 61 for i in range(40)}
    sampler = StitchSampler(flops_bins(flops, step=7), stitches_per_step=2)
    assert flops[sampler.draw(0)] == max(flops.values()) and flops[sampler.draw(1)] == min(flops.values())


def test_a_step_runs_at_least_one_stitch() -> None:
    with pytest.raises(ValueError, match="stitches_per_step=0"):
        StitchSampler(BINS, stitches_per_step=0)
