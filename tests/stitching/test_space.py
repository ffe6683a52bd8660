"""The stitch space against the paper's table (SN-Netv2, arXiv 2307.00154), enumerated here independently."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from mmsnnet.stitching import LayerKey, Segment, Stitch, StitchSpace, Tap, UnknownStitchError

WHOLE = [(12, 24), (12, 12), (2, 4), (2, 2), (3, 9)]
UNEVEN = [(8, 12), (5, 7), (12, 40), (2, 3), (6, 7)]
# Ti-S-B, S-B-L, and depths at which floor(i * D0 / D2) is not always the block of the group that i is in.
THREE = [(12, 12, 12), (12, 12, 24), (2, 4, 8), (8, 12, 24), (3, 5, 7), (2, 2, 2)]
MORE = [(2, 3, 4, 4), (2, 4, 6, 9, 9)]
LABELS = {2: "SL", 3: "SML", 4: "ABCD", 5: "ABCDE"}

Segments = tuple[tuple[int, int, int], ...]


def published(depths: tuple[int, int]) -> list[tuple[str, Segments] | None]:
    """Kind and segments (anchor, start, stop), row by row as in the paper's table for a whole ratio; None in the row
    that is no stitch."""
    d0, d1 = depths
    r = d1 // d0
    m = {i: i * d0 // d1 for i in range(d1)}
    sl = range(d0)
    ls = [i for i in range(d1 - 1) if i % r == r - 1]
    rows: list[tuple[str, Segments] | None] = [("S", ((0, 0, d0),)), ("L", ((1, 0, d1),))]
    for i in sl:
        rows.append(None if i == d0 - 1 else ("SL", ((0, 0, i + 1), (1, (i + 1) * r, d1))))
    for i in ls:
        rows.append(("LS", ((1, 0, i + 1), (0, m[i] + 1, d0))))
    for i in ls:
        for f in sl[:-1]:
            if f >= m[i] + 1:
                rows.append(("LSL", ((1, 0, i + 1), (0, m[i] + 1, f + 1), (1, (f + 1) * r, d1))))
    for f in sl:
        for i in ls:
            if i >= (f + 1) * r:
                rows.append(("SLS", ((0, 0, f + 1), (1, (f + 1) * r, i + 1), (0, m[i] + 1, d0))))
    return rows


def stitches(rows: list[tuple[str, Segments] | None]) -> dict[int, tuple[str, Segments]]:
    """By id, the number of the row."""
    return {id_: row for id_, row in enumerate(rows) if row is not None}


def as_triples(stitch: Stitch) -> Segments:
    return tuple((s.anchor, s.start, s.stop) for s in stitch.segments)


def groups(depths: tuple[int, int]) -> list[list[int]]:
    """The large blocks that correspond to each small block: those ``i`` with ``floor(i * D0 / D1)`` equal to it."""
    d0, d1 = depths
    return [[i for i in range(d1) if i * d0 // d1 == f] for f in range(d0)]


@pytest.mark.parametrize("depths", WHOLE)
def test_two_way_is_the_published_enumeration(depths: tuple[int, int]) -> None:
    space = StitchSpace.two_way(depths)
    assert {s.id: (s.kind, as_triples(s)) for s in space} == stitches(published(depths))


@pytest.mark.parametrize("depths", [(12, 12, 12), (12, 12, 24), (2, 4, 8), (2, 2, 2), (2, 4, 4, 8)])
def test_more_anchors_are_the_published_enumeration_of_each_pair(depths: tuple[int, ...]) -> None:
    """The anchors, then all rows of each pair's table but its first two."""
    labels = LABELS[len(depths)]
    rows: list[tuple[str, Segments] | None] = [(label, ((a, 0, depths[a]),)) for a, label in enumerate(labels)]
    for small in range(len(depths) - 1):
        names = dict(zip("SL", labels[small : small + 2], strict=True))
        for row in published((depths[small], depths[small + 1]))[2:]:
            if row is not None:
                kind, segments = row
                row = "".join(names[letter] for letter in kind), tuple((small + a, *run) for a, *run in segments)
            rows.append(row)
    space = StitchSpace.two_way(depths)
    assert {s.id: (s.kind, as_triples(s)) for s in space} == stitches(rows)


@pytest.mark.parametrize("depths", [(12, 12, 12), (12, 12, 24)])
def test_three_anchors_have_twice_the_stitches_of_a_pair(depths: tuple[int, ...]) -> None:
    space = StitchSpace.two_way(depths)
    kinds = [s.kind for s in space]
    singles, doubles = ("SM", "MS", "ML", "LM"), ("MSM", "SMS", "LML", "MLM")
    assert {kind: kinds.count(kind) for kind in kinds} == (
        dict.fromkeys("SML", 1) | dict.fromkeys(singles, 11) | dict.fromkeys(doubles, 55)
    )
    # 13 of either pair's table is skipped: 3 + 13 - 2, and the same behind the 133 ids of the first pair.
    assert [s.id for s in space] == [i for i in range(3 + 2 * 133) if i not in (14, 147)]
    assert len(space.layers) == len(set(space.layers)) == 2 * (12 + 11)


@pytest.mark.parametrize("depths", THREE + MORE)
def test_the_documented_formula_of_ids(depths: tuple[int, ...]) -> None:
    space = StitchSpace.two_way(depths)
    actual = {stitch.id: stitch for stitch in space.anchors}
    assert list(actual) == list(range(len(depths)))
    before = 0
    for small in range(len(depths) - 1):
        for of_pair in list(StitchSpace.two_way(depths[small : small + 2]))[2:]:
            stitch = space[len(depths) + before + of_pair.id - 2]
            assert as_triples(stitch) == tuple((small + a, *run) for a, *run in as_triples(of_pair))
            actual[stitch.id] = stitch
        before += depths[small] + (depths[small] - 1) ** 2
    assert list(actual.values()) == list(space)


@pytest.mark.parametrize("depths", [(12, 24), (12, 12)])
def test_published_counts(depths: tuple[int, int]) -> None:
    space = StitchSpace.two_way(depths)
    kinds = [s.kind for s in space]
    assert len(space) == 134
    assert {kind: kinds.count(kind) for kind in kinds} == {"S": 1, "L": 1, "SL": 11, "LS": 11, "LSL": 55, "SLS": 55}
    assert len(space.layers) == len(set(space.layers)) == 12 + 11
    assert [s.id for s in space] == [i for i in range(135) if i != 13]


@pytest.mark.parametrize("depths", WHOLE + UNEVEN + THREE + MORE)
@pytest.mark.parametrize("scheme", ["two_way", "one_way"])
def test_each_route_covers_each_group_once_in_order(depths: tuple[int, ...], scheme: str) -> None:
    for stitch in getattr(StitchSpace, scheme)(depths):
        anchors = {segment.anchor for segment in stitch.segments}
        small = min(*anchors, len(depths) - 2)
        assert anchors <= {small, small + 1}, "a route stays within one pair"
        by_anchor = {small: [[f] for f in range(depths[small])], small + 1: groups(depths[small : small + 2])}
        covered = []
        for segment in stitch.segments:
            blocks = list(range(segment.start, segment.stop))
            inside = [f for f, group in enumerate(by_anchor[segment.anchor]) if set(group) <= set(blocks)]
            assert [block for f in inside for block in by_anchor[segment.anchor][f]] == blocks, str(stitch)
            covered += inside
        assert covered == list(range(depths[small])), str(stitch)


@pytest.mark.parametrize("depths", WHOLE + UNEVEN + THREE + MORE)
def test_layers_join_the_segments_of_a_route(depths: tuple[int, ...]) -> None:
    space = StitchSpace.two_way(depths)
    for stitch in space:
        joints = zip(stitch.segments[:-1], stitch.segments[1:], strict=True)
        assert stitch.layers == tuple(LayerKey(a.anchor, a.stop - 1, b.anchor, b.start) for a, b in joints)
        assert set(stitch.layers) <= set(space.layers)
        assert stitch.kind == "".join(LABELS[len(depths)][s.anchor] for s in stitch.segments)


@pytest.mark.parametrize("depths", WHOLE + UNEVEN)
def test_every_change_over_is_offered(depths: tuple[int, int]) -> None:
    """Routes with at most two changes over are all the ways to cut the groups into runs of alternating anchors."""
    d0 = depths[0]
    assert len(StitchSpace.two_way(depths)) == 2 + 2 * (d0 - 1) + (d0 - 1) * (d0 - 2)
    assert len({as_triples(s) for s in StitchSpace.two_way(depths)}) == len(StitchSpace.two_way(depths))


def corresponding(depths: tuple[int, ...], index: int) -> list[int]:
    """The block of each anchor whose group, or whose group's group, block ``index`` of the largest one is in."""
    blocks = [index]
    for small in reversed(range(len(depths) - 1)):
        (block,) = (f for f, group in enumerate(groups(depths[small : small + 2])) if blocks[0] in group)
        blocks.insert(0, block)
    return blocks


@pytest.mark.parametrize("depths", WHOLE + UNEVEN + THREE + MORE)
@pytest.mark.parametrize("scheme", ["two_way", "one_way"])
def test_each_tap_has_exactly_one_block_on_every_route(depths: tuple[int, ...], scheme: str) -> None:
    space = getattr(StitchSpace, scheme)(depths)
    wanted = [1, *range(depths[-1]), 0]
    for stitch in space:
        on_route = {(s.anchor, block) for s in stitch.segments for block in range(s.start, s.stop)}
        taps = space.taps(stitch, wanted)
        for index, tap in zip(wanted, taps, strict=True):
            candidates = set(enumerate(corresponding(depths, index))) & on_route
            assert candidates == {(tap.anchor, tap.block)}, f"{stitch} at {index}"


@pytest.mark.parametrize("depths", WHOLE + UNEVEN + THREE + MORE)
@pytest.mark.parametrize("scheme", ["two_way", "one_way"])
def test_taps_come_in_the_width_of_the_largest_anchor(depths: tuple[int, ...], scheme: str) -> None:
    """One layer for each anchor on the way up, each leaving the block behind which the one before it enters."""
    space = getattr(StitchSpace, scheme)(depths)
    for stitch in space:
        for tap in space.taps(stitch, range(depths[-1])):
            block = tap.block
            assert len(tap.layers) == len(depths) - 1 - tap.anchor
            for small, layer in enumerate(tap.layers, start=tap.anchor):
                last = groups(depths[small : small + 2])[block][-1]
                assert layer == LayerKey(small, block, small + 1, last + 1) and layer in space.layers
                block = last


def test_taps_of_three_anchors_by_hand() -> None:
    space = StitchSpace.two_way((8, 12, 24))
    # 19 of 24 is in the group of 9 of 12, and that in the group of 6 of 8, with 10: the last block of 10's group is 21.
    assert [space.corresponding_block(anchor, 19) for anchor in range(3)] == [6, 9, 19]
    up = (LayerKey(0, 6, 1, 11), LayerKey(1, 10, 2, 22))
    assert space.taps(space["S"], (19,)) == (Tap(0, 6, up),)
    assert space.taps(space["M"], (19,)) == (Tap(1, 9, (LayerKey(1, 9, 2, 20),)),)
    assert space.taps(space["L"], (19,)) == (Tap(2, 19),)
    # From pair to pair; straight from the largest to the smallest, floor(3 * 8 / 24) would be 1.
    assert [space.corresponding_block(anchor, 3) for anchor in range(3)] == [0, 1, 3]
    # The group of S0 is M0 and M1, and theirs L0 to L3.
    assert as_triples(space["S0-M2"]) == ((0, 0, 1), (1, 2, 12))
    assert [(t.anchor, t.block) for t in space.taps(space["S0-M2"], (0, 3, 4, 23))] == [(0, 0), (0, 0), (1, 2), (1, 11)]
    assert as_triples(space["L1-M1-L16"]) == ((2, 0, 2), (1, 1, 8), (2, 16, 24))


def test_published_taps_of_the_small_anchor() -> None:
    space = StitchSpace.two_way((12, 24))
    taps = space.taps(space["S"], (9, 14, 19, 23))
    assert [(tap.anchor, tap.block) for tap in taps] == [(0, 4), (0, 7), (0, 9), (0, 11)]
    assert [tap.block for tap in space.taps(space["S"], (4, 11, 17, 23))] == [2, 5, 8, 11]
    assert space.taps(space["L"], (9, 23)) == (Tap(1, 9), Tap(1, 23))


@pytest.mark.parametrize("index", [-1, 24, 100])
def test_taps_outside_the_largest_anchor(index: int) -> None:
    space = StitchSpace.two_way((12, 24))
    with pytest.raises(ValueError, match=rf"23.*{index}"):
        space.taps(space["S"], (0, index))


@pytest.mark.parametrize("depths", WHOLE + UNEVEN + THREE + MORE)
def test_lookup_by_id_name_and_digits(depths: tuple[int, ...]) -> None:
    space = StitchSpace.two_way(depths)
    for stitch in space:
        assert space[stitch.id] is space[stitch.name] is space[str(stitch.id)] is stitch
        assert stitch.id in space and stitch.name in space and stitch in space
    assert len({s.name for s in space}) == len(space)
    assert list(space) == sorted(space, key=lambda s: s.id)


def test_published_names() -> None:
    space = StitchSpace.two_way((12, 24))
    assert as_triples(space["S4-L10"]) == ((0, 0, 5), (1, 10, 24))
    assert space["S4-L10"].id == 6
    assert as_triples(space["L5-S3-L12"]) == ((1, 0, 6), (0, 3, 6), (1, 12, 24))
    # LSL from id 25 on, 10 that leave the large anchor at block 1, 9 at block 3; at block 5, small blocks 3, 4, 5
    assert space[25 + 10 + 9 + 2] is space["L5-S3-L12"]
    assert str(space[46]) == "46 (L5-S3-L12)"
    assert as_triples(space["S2-L6-S5"]) == ((0, 0, 3), (1, 6, 10), (0, 5, 12))


@pytest.mark.parametrize(
    ("spec", "ids"),
    [
        ("anchors", [0, 1]),
        ("57,S4-L10", [6, 57]),
        ("57 | 2", [2, 57]),
        ("S4-L10", [6]),
        ([57, "0", "S4-L10", 6], [0, 6, 57]),
        ("all", [i for i in range(135) if i != 13]),
    ],
)
def test_select(spec: str | list[int | str], ids: list[int]) -> None:
    space = StitchSpace.two_way((12, 24))
    assert [s.id for s in space.select(spec)] == ids


@pytest.mark.parametrize("spec", ["13", "0,S4-L11", [135], "anchor", ""])
def test_select_what_there_is_not(spec: str | list[int | str]) -> None:
    with pytest.raises(UnknownStitchError):
        StitchSpace.two_way((12, 24)).select(spec)


def test_id_13_keeps_its_place_but_is_no_stitch() -> None:
    space = StitchSpace.two_way((12, 24))
    assert 13 not in space and 12 in space and 14 in space
    assert LayerKey(0, 11, 1, 24) in space.layers
    with pytest.raises(UnknownStitchError, match=r"13 .*nothing of the larger anchor, L,"):
        space[13]


def test_ids_of_three_anchors_that_are_no_stitch() -> None:
    space = StitchSpace.two_way((12, 12, 24))
    assert LayerKey(0, 11, 1, 12) in space.layers and LayerKey(1, 11, 2, 24) in space.layers
    for id_, larger in ((14, "M"), (147, "L")):
        assert id_ not in space and id_ - 1 in space and id_ + 1 in space
        with pytest.raises(UnknownStitchError, match=rf"{id_} .*nothing of the larger anchor, {larger},"):
            space[id_]
    with pytest.raises(UnknownStitchError, match=r"'S4-L5' .*267: ids run from 0 to 268 without 14, 147, names are"):
        space["S4-L5"]
    one_way = StitchSpace.one_way((12, 12, 24))
    assert [s.id for s in one_way] == [*range(14), *range(136, 147)]
    for id_, why in ((14, "nothing of the larger anchor, M,"), (15, "M0-S1 changes over to a smaller anchor.*two_way")):
        with pytest.raises(UnknownStitchError, match=f"{id_} .*{why}"):
            one_way[id_]
    with pytest.raises(UnknownStitchError, match=r"147 .*of 25: ids run from 0 to 146 without 14 to 135, names"):
        one_way[147]


@pytest.mark.parametrize("key", [135, -1, "200", "S4-L11", "s", ""])
def test_unknown_stitch(key: int | str) -> None:
    space = StitchSpace.two_way((12, 24))
    assert key not in space
    with pytest.raises(UnknownStitchError, match=r"134.*0 to 134") as caught:
        space[key]
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, ValueError)
    assert str(key) in str(caught.value) and "S" in str(caught.value)


def test_anchors_smallest_first() -> None:
    space = StitchSpace.two_way((12, 24))
    assert [(s.id, s.name) for s in space.anchors] == [(0, "S"), (1, "L")]
    assert [space.corresponding_block(0, i) for i in (0, 1, 2, 23)] == [0, 0, 1, 11]
    assert [space.corresponding_block(1, i) for i in (0, 1, 2, 23)] == [0, 1, 2, 23]
    three = StitchSpace.two_way((12, 12, 24))
    assert (
        [(s.id, s.name) for s in three.anchors]
        == [(0, "S"), (1, "M"), (2, "L")]
        == [(s.id, s.name) for s in three.select("anchors")]
    )
    assert [s.name for s in StitchSpace.two_way((2, 2, 2, 2)).anchors] == ["A", "B", "C", "D"]


def test_equality_hash_and_immutability() -> None:
    space, same = StitchSpace.two_way((4, 8)), StitchSpace.two_way([4, 8])
    hash_before = hash(space)
    assert space["S"] is not None  # fills the look-up tables, which are no part of the value
    assert space == same and hash(space) == hash(same) == hash_before
    others = [StitchSpace.two_way((4, 4)), StitchSpace.one_way((4, 8)), StitchSpace.single(4)]
    assert len({space, same, *others}) == 4
    for frozen, field in (
        (space, "depths"),
        (space["S"], "id"),
        (space.layers[0], "source"),
        (Segment(0, 0, 1), "stop"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, field, 0)


@pytest.mark.parametrize("depths", [(12, 24), (4, 4), (5, 7), (12, 12, 24), (8, 12, 24), (2, 3, 4, 4)])
def test_one_way_is_what_two_way_has_without_ways_down(depths: tuple[int, ...]) -> None:
    one, two = StitchSpace.one_way(depths), StitchSpace.two_way(depths)
    labels = LABELS[len(depths)]
    kinds = [*labels, *(labels[small : small + 2] for small in range(len(depths) - 1))]
    assert list(one) == [s for s in two if s.kind in kinds]
    assert len(one) == len(depths) + sum(depth - 1 for depth in depths[:-1])
    assert one.layers == tuple(key for key in two.layers if key.source < key.target)
    for stitch in one:
        assert one.taps(stitch, range(depths[-1])) == two.taps(stitch, range(depths[-1]))


def test_single() -> None:
    space = StitchSpace.single(3)
    assert list(space) == [Stitch(0, "A", "A", (Segment(0, 0, 3),))]
    assert space.layers == () and space.anchors == (space["A"],)
    assert space.taps(space[0], (2, 0)) == (Tap(0, 2), Tap(0, 0))
    with pytest.raises(ValueError, match="3"):
        space.taps(space[0], (3,))
    with pytest.raises(ValueError, match="at least one block"):
        StitchSpace.single(0)


@pytest.mark.parametrize(
    ("depths", "says"),
    [
        ((), r"two anchors.*\(\)"),
        ((12,), r"two anchors.*\(12,\)"),
        ((2,) * 27, "26 at most"),
        ((24, 12), "anchors 0 and 1 .*smallest to the largest.*depths 24 and 12"),
        ((0, 12), r"at least one block in each stage, got \(0, 12\)"),
        (((2, 2), (2, 0)), r"at least one block in each stage, got \(\(2, 2\), \(2, 0\)\)"),
        (((2, 2, 6, 2), 12), r"anchors 0 and 1 .*stages do not correspond; got blocks \(2, 2, 6, 2\) and \(12,\)"),
        ((1, 12), "one block"),
        ((1, 1), "one block"),
        ((12, 24, 12), "anchors 1 and 2 .*smallest to the largest.*depths 24 and 12"),
        ((1, 12, 24), "anchors 0 and 1 .*one block.*depths 1 and 12"),
    ],
)
@pytest.mark.parametrize("scheme", ["two_way", "one_way"])
def test_depths_that_cannot_be_stitched(depths: tuple[int, ...], says: str, scheme: str) -> None:
    with pytest.raises(ValueError, match=says):
        getattr(StitchSpace, scheme)(depths)


# Swin-Ti to Swin-S, ResNet-18 to 50, equal ones, three, and RegNets, of which the smaller one is deeper in a stage.
STAGED = [
    ((2, 2, 6, 2), (2, 2, 18, 2)),
    ((2, 2, 2, 2), (3, 4, 6, 3)),
    ((3, 3, 3), (3, 3, 3)),
    ((1, 1, 3), (2, 3, 7), (2, 3, 8)),
    ((1, 1, 4, 7), (1, 3, 6, 6)),
]
Stages = tuple[tuple[int, ...], ...]


def stage_groups(small: tuple[int, ...], large: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The blocks of both anchors that correspond, counted over all stages, in order."""
    found = []
    for stage, (n0, n1) in enumerate(zip(small, large, strict=True)):
        start0, start1 = sum(small[:stage]), sum(large[:stage])
        for few in range(min(n0, n1)):
            many = groups((min(n0, n1), max(n0, n1)))[few]
            one, other = ([few], many) if n0 <= n1 else (many, [few])
            found.append(([start0 + i for i in one], [start1 + i for i in other]))
    return found


@pytest.mark.parametrize("depths", [*WHOLE, *UNEVEN, *THREE])
def test_a_number_stands_for_one_stage(depths: tuple[int, ...]) -> None:
    assert StitchSpace.two_way([(depth,) for depth in depths]) == StitchSpace.two_way(depths)
    assert StitchSpace.two_way(depths).stages == tuple((depth,) for depth in depths)


@pytest.mark.parametrize("stages", STAGED)
@pytest.mark.parametrize("scheme", ["two_way", "one_way"])
def test_each_route_runs_each_group_of_a_stage_once(stages: Stages, scheme: str) -> None:
    space = getattr(StitchSpace, scheme)(stages)
    assert space.depths == tuple(map(sum, stages))
    number = len(stages)
    for small in range(number - 1):
        corresponding = stage_groups(*stages[small : small + 2])
        if scheme == "two_way":  # the published formula, with groups in the place of the small anchor's blocks
            number += len(corresponding) + (len(corresponding) - 1) ** 2 - 1
        for stitch in space:
            anchors = {segment.anchor for segment in stitch.segments}
            if anchors != {small, small + 1}:
                continue
            for blocks in corresponding:
                runs = [
                    [
                        block
                        for segment in stitch.segments
                        if segment.anchor == small + i
                        for block in segment_of(segment)
                    ]
                    for i in (0, 1)
                ]
                whole = [set(blocks[i]) <= set(runs[i]) for i in (0, 1)]
                parts = [set(blocks[i]) & set(runs[i]) for i in (0, 1)]
                assert sorted(whole) == [False, True] and sum(map(bool, parts)) == 1
    assert scheme == "one_way" or len(space) == number


def segment_of(segment: Segment) -> range:
    return range(segment.start, segment.stop)


@pytest.mark.parametrize("stages", STAGED)
def test_both_ends_of_a_layer_lie_in_one_stage(stages: Stages) -> None:
    def stage_of(anchor: int, block: int) -> int:
        return next(stage for stage in range(len(stages[anchor])) if block < sum(stages[anchor][: stage + 1]))

    space = StitchSpace.two_way(stages)
    assert len(set(space.layers)) == len(space.layers)
    for key in space.layers:
        assert stage_of(key.source, key.source_block) == stage_of(key.target, key.target_block - 1)


@pytest.mark.parametrize("stages", STAGED)
@pytest.mark.parametrize("scheme", ["two_way", "one_way"])
def test_the_ends_of_stages_are_tapped_on_every_route(stages: Stages, scheme: str) -> None:
    """By the last block of that stage in the anchor that the route is in, mapped to the last one of the largest."""
    space = getattr(StitchSpace, scheme)(stages)
    ends = [[sum(one[: stage + 1]) - 1 for stage in range(len(one))] for one in stages]
    for stitch in space:
        for stage, tap in enumerate(space.taps(stitch, ends[-1])):
            assert tap.block == ends[tap.anchor][stage]
            assert any(segment.anchor == tap.anchor and tap.block in segment for segment in stitch.segments)
            for key, anchor in zip(tap.layers, range(tap.anchor, len(stages)), strict=False):
                assert (key.source, key.source_block) == (anchor, ends[anchor][stage])
                assert (key.target, key.target_block) == (anchor + 1, ends[anchor + 1][stage] + 1)
            assert len(tap.layers) == len(stages) - 1 - tap.anchor


def test_names_of_stages() -> None:
    space = StitchSpace.two_way([(2, 2, 6, 2), (2, 2, 18, 2)])
    stitch = space["S2.4-L2.15"]
    assert as_triples(stitch) == ((0, 0, 9), (1, 19, 24))
    assert as_triples(space["S1.1-L2.0"]) == ((0, 0, 4), (1, 4, 24))  # before the large anchor's downsampling
    assert as_triples(space["L2.8-S2.3"]) == ((1, 0, 13), (0, 7, 12))
    assert len({stitch.name for stitch in space}) == len(space)


PUBLISHED = dict(
    deit_ti_s_b=((), 71), swin_ti_s_b=((3,), 41), resnet18_resnet50=((0, 3), 10), resnet18_swin_ti=((0, 3), 8)
) | dict(levit_192_256=((2,), 8))


@pytest.mark.parametrize("family", PUBLISHED)
def test_sliding_windows_are_the_published_enumerations(family: str) -> None:
    """Ids, segments, order and shared layers of SN-Net's five families."""
    published = json.loads((Path(__file__).parent / f"published/v1_{family}.json").read_text())
    skip, number = PUBLISHED[family]
    stages = [anchor["depths"] for anchor in published["anchors"]]
    space = StitchSpace.sliding_window(stages, skip)
    assert len(space) == len(published["stitches"]) == number
    shared: dict[LayerKey, str] = {}
    for stitch, entry in zip(space, published["stitches"], strict=True):
        segments: list[list[int]] = []
        for part in entry["segments"]:
            start = sum(stages[part["anchor"]][: part["stage"]])
            first, stop = (start + block for block in part["blocks"])
            if segments and segments[-1][0] == part["anchor"]:
                segments[-1][2] = stop
            else:
                segments.append([part["anchor"], first, stop])
        assert (stitch.id, as_triples(stitch)) == (entry["id"], tuple(map(tuple, segments)))
        assert len(stitch.layers) == len(segments) - 1
        for key in stitch.layers:
            assert shared.setdefault(key, entry["layer"]) == entry["layer"]
    assert len(set(shared.values())) == len(shared) == len(space.layers)
    assert len({stitch.name for stitch in space}) == len(space)
    with pytest.raises(ValueError, match="sliding window has no layers for taps"):
        space.taps(space[0], (0,))


@pytest.mark.parametrize(
    ("stages", "skip", "says"),
    [
        (((1, 1, 4, 7), (1, 3, 6, 6)), (), "7 and 6 blocks in stage 3.*add 3 to skip"),
        (((2, 2), (2, 2)), (0, 1), "no crossing"),
        (((1, 2), (1, 2)), (1,), "no crossing"),
    ],
)
def test_windows_that_cannot_slide(stages: Stages, skip: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StitchSpace.sliding_window(stages, skip)


def test_only_a_sliding_window_skips_stages() -> None:
    assert StitchSpace.of("sliding_window", [(2, 2), (2, 2)], (1,)) == StitchSpace.sliding_window([(2, 2)] * 2, (1,))
    with pytest.raises(ValueError, match=r"only scheme='sliding_window' skips stages; got 'two_way' and skip=\(1,\)"):
        StitchSpace.of("two_way", [(2, 2), (2, 2)], (1,))


@pytest.mark.parametrize("bounds", [(2, 2), (3, 2), (-1, 2)])
def test_segments_are_never_empty(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"[{bounds[0]}, {bounds[1]})")):
        Segment(0, *bounds)


def test_segment_is_half_open() -> None:
    segment = Segment(1, 2, 5)
    assert [block for block in range(7) if block in segment] == [2, 3, 4] and len(segment) == 3


def test_a_stitch_has_one_layer_less_than_segments() -> None:
    with pytest.raises(ValueError, match="2 segments need 1"):
        Stitch(0, "X", "SL", (Segment(0, 0, 1), Segment(1, 1, 2)))


@pytest.mark.parametrize("depths", [(2, 4), (3, 5), (3, 5, 7)])
@pytest.mark.parametrize("out_indices", [None, (0, 3)])
def test_a_space_of_one_stitch_of_another(depths: tuple[int, ...], out_indices: tuple[int, ...] | None) -> None:
    space = StitchSpace.two_way(depths)
    for stitch in space:
        taps = () if out_indices is None else space.taps(stitch, out_indices)
        layers = {*stitch.layers, *(layer for tap in taps for layer in tap.layers)}
        one = space.only(stitch.name, layers)
        assert one == space.only(stitch.id, layers)
        assert tuple(one) == (one[stitch.id],) == (one[stitch.name],) == one.select("all") == (stitch,)
        assert one.layers == tuple(layer for layer in space.layers if layer in layers)
        assert one.anchors == ((stitch,) if stitch in space.anchors else ())
        assert (one.depths, one.scheme) == (space.depths, space.scheme)
        if out_indices is not None:
            assert one.taps(stitch, out_indices) == taps


def test_a_space_of_one_stitch_has_no_other() -> None:
    one = StitchSpace.two_way((12, 24)).only(57, ())
    assert one.select("57") == one.stitches
    with pytest.raises(UnknownStitchError, match="no stitch 'anchors' in this space of one"):
        one.select("anchors")
    for other in (0, 58, "L", "L1-S1"):
        with pytest.raises(UnknownStitchError, match=rf"no stitch {other!r} in this space of one: 57 \(L7-S4-L20\)"):
            one[other]
    with pytest.raises(UnknownStitchError, match="stitch id 13 is not in the space"):
        StitchSpace.two_way((12, 24)).only(13, ())
