"""Scenes of shapes: what they show, what tells their classes, and that the quickstart's are what they were."""

import colorsys
import zlib
from itertools import combinations

import numpy as np
import pytest

import mmsnnet.datasets.procedural.shapes as shapes
from mmsnnet.datasets import CLASSES, MIN_SIDE, PALETTE, make_scene, scene_rng
from mmsnnet.datasets.procedural.shapes import (
    MAX_LOOKS,
    SHAPES,
    Figure,
    Look,
    Scene,
    Thing,
    distinct_looks,
    make_portrait,
)

SIZE = (48, 64)


def scene(seed: int = 0, split: str = "train", index: int = 0, size: tuple[int, int] = SIZE, **options) -> Scene:
    return make_scene(scene_rng(seed, split, index), size, **options)


def hue_of(image: np.ndarray, mask: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*image[mask].mean(axis=0) / 255)[0]


def hue_distance(one: float, other: float) -> float:
    return abs((one - other + 0.5) % 1 - 0.5)


# What an image depends on


def test_a_scene_is_a_function_of_seed_split_and_index_alone():
    wanted = scene(3, "val", 7)
    np.random.seed(1)
    scene(3, "val", 6)
    again = scene(3, "val", 7)
    np.testing.assert_array_equal(again.image, wanted.image)
    np.testing.assert_array_equal(again.owners, wanted.owners)


def test_making_a_scene_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].copy()
    scene()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_images_differ_between_seeds_splits_and_indices():
    made = [scene(seed, split, i).image.tobytes() for seed in (0, 1) for split in ("train", "val") for i in range(10)]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(
    ("index", "checksum", "brightness"),
    [(0, 1289512665, 123.116699), (1, 972195980, 156.159180), (2, 1436574775, 124.081217)],
)
def test_the_quickstarts_images_are_those_of_its_published_figures(index, checksum, brightness):
    """Recorded when the quickstart's figures in the README were measured."""
    made = scene(index=index, size=(64, 64))
    assert zlib.crc32(made.labels().tobytes()) == checksum
    assert made.image.mean() == pytest.approx(brightness, abs=1e-3)


# What an image shows


@pytest.mark.parametrize("size", [(MIN_SIDE, MIN_SIDE), (48, 64), (128, 128), (40, 200)])
@pytest.mark.parametrize("looks", [SHAPES, distinct_looks(170)], ids=len)
def test_scenes_have_the_promised_form(size, looks):
    for index in range(5):
        made = scene(index=index, size=size, looks=looks)
        assert made.image.shape == (*size, 3) and made.image.dtype == np.uint8
        labels = made.labels()
        assert labels.shape == size and labels.dtype == np.uint8
        assert labels.max() <= len(looks)
        assert labels.any(), "a scene without a single shape"
        assert made.image.std() > 1


@pytest.mark.slow
def test_every_class_has_a_share_and_background_the_greatest():
    counts = sum(np.bincount(scene(index=i).labels().ravel(), minlength=len(CLASSES)) for i in range(100))
    shares = counts / counts.sum()
    assert shares.argmax() == 0 and 0.5 < shares[0] < 0.8
    assert shares[1:].min() > 0.02


def test_classes_and_palette_go_together():
    assert len(CLASSES) == len(PALETTE) == len(set(CLASSES)) == len(set(PALETTE)) == 8
    assert all(len(colour) == 3 and all(0 <= c <= 255 for c in colour) for colour in PALETTE)


def test_labels_tell_shapes_from_blobs_and_background():
    disc = Figure("disc", (20, 20), 8, 0.0, 1.0)
    things = (Thing(0, (disc,)), Thing(5, (disc,)), Thing(2, (disc, disc)))
    owners = np.array([[-1, 0], [1, 2]], np.int16)
    made = Scene(np.zeros((2, 2, 3), np.uint8), things, owners)
    np.testing.assert_array_equal(made.labels(), [[0, 0], [5, 2]])
    np.testing.assert_array_equal(made.labels(blobs=255), [[0, 255], [5, 2]])


def test_the_nearer_thing_hides_the_farther(monkeypatch):
    far, near = Figure("square", (24, 32), 14, 0.0, 1.0), Figure("disc", (24, 40), 10, 0.0, 1.0)
    monkeypatch.setattr(shapes, "_place_things", lambda *_: [Thing(2, (far,)), Thing(1, (near,))])
    made = scene()
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    in_disc = np.hypot(y - 24, x - 40) < 0.85 * 10 - 1
    in_square = np.maximum(abs(y - 24), abs(x - 32)) < 0.75 * 14 - 1
    assert (in_disc & in_square).any()
    assert (made.owners[in_disc] == 1).all()
    assert (made.owners[in_square & (np.hypot(y - 24, x - 40) > 0.85 * 10 + 1)] == 0).all()


@pytest.mark.slow
def test_crowds_are_small_copies_of_one_class():
    made = [scene(index=i, size=(96, 96), crowd_share=0.3) for i in range(40)]
    shown = [thing for one in made for thing in one.things if thing.label]
    crowds = [thing for thing in shown if thing.is_crowd]
    assert 0.15 < len(crowds) / len(shown) < 0.45
    for thing in crowds:
        assert 4 <= len(thing.figures) <= 7
        assert len({(figure.outline, figure.radius) for figure in thing.figures}) == 1
        assert thing.figures[0].radius <= 0.4 * 0.32 * 96
        assert all(0 <= c <= 96 for figure in thing.figures for c in figure.centre)
    assert not any(thing.is_crowd for i in range(10) for thing in scene(index=i).things)


@pytest.mark.parametrize("look", distinct_looks(10)[::3], ids=lambda look: look.outline)
def test_a_portrait_shows_one_large_shape(look):
    for index in range(5):
        made = make_portrait(scene_rng(0, "train", index), (64, 64), look)
        (shown,) = [k for k, thing in enumerate(made.things) if thing.label]
        assert made.things[shown].figures[0].outline == look.outline
        # The thinnest, the bar, covers 2.4 x 0.5 radii squared, the radius being 16 at the least.
        assert (made.owners == shown).sum() > 0.9 * 2.4 * 0.5 * 16**2
        assert hue_distance(hue_of(made.image, made.owners == shown), look.hue) < 0.2


# What tells a class


@pytest.mark.slow
def test_the_hue_hints_at_the_class_but_does_not_decide_it():
    """The class whose hue is nearest to a shape's mean colour is right far more often than by chance, not always."""
    right = []
    for index in range(100):
        made = scene(index=index)
        labels = made.labels()
        for label in set(np.unique(labels)) - {0}:
            hue = hue_of(made.image, labels == label)
            right.append(int(np.argmin([hue_distance(hue, k / 7) for k in range(7)])) + 1 == label)
    assert 2 / 7 < np.mean(right) < 0.95


def test_looks_differ_and_neighbours_do_in_outline_and_hue():
    looks = distinct_looks(MAX_LOOKS)
    assert len(set(looks)) == MAX_LOOKS == 175
    for one, other in combinations(looks[:5], 2):
        assert one.outline != other.outline and one.hue != other.hue
    assert distinct_looks(10) == looks[:10]


@pytest.mark.parametrize("count", [0, 176])
def test_there_are_only_so_many_looks(count):
    with pytest.raises(ValueError, match=f"must be 1 to 175.*{count}"):
        distinct_looks(count)


@pytest.mark.slow
def test_many_classes_have_the_hue_of_their_look():
    looks = distinct_looks(150)
    right = []
    for index in range(60):
        made = scene(index=index, size=(64, 64), looks=looks)
        for k, thing in enumerate(made.things):
            mask = made.owners == k
            if thing.label and mask.sum() > 30:
                hue = hue_of(made.image, mask)
                nearest = int(np.argmin([hue_distance(hue, k / 5) for k in range(5)]))
                right.append(nearest / 5 == looks[thing.label - 1].hue)
    assert len(right) > 100
    assert np.mean(right) > 0.85


def test_a_texture_of_its_own_can_be_seen():
    """Checks vary more within the figure than a plain colour does, whatever the light and the noise."""
    spread = {}
    for texture in ("plain", "checks"):
        spreads = []
        for index in range(30):
            made = make_portrait(scene_rng(0, "train", index), (64, 64), Look("square", 0.6, texture))
            spreads.append(made.image[made.owners == len(made.things) - 1].std(axis=0).max())
        spread[texture] = np.median(spreads)
    assert spread["checks"] > 1.5 * spread["plain"]


# Outlines


@pytest.mark.parametrize("outline", shapes.OUTLINES)
def test_a_shape_lies_whole_within_its_window_and_turns_with_its_angle(outline):
    for stretch in (0.8, 1.25):
        for angle in np.linspace(0, 2 * np.pi, 9):
            upright = Figure(outline, (64, 64), 25, 0.0, stretch)
            turned = Figure(outline, (64, 64), 25, float(angle), stretch)
            window, coverage = turned.draw((128, 128))
            assert coverage.shape == tuple(s.stop - s.start for s in window)
            assert not any(edge.any() for edge in (coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]))
            assert coverage.sum() == pytest.approx(upright.draw((128, 128))[1].sum(), rel=0.03)


def test_the_outline_is_smooth_in_the_image_and_crisp_in_the_labels(monkeypatch):
    disc = Figure("disc", (24, 32), 15, 0.0, 1.0)
    monkeypatch.setattr(shapes, "_place_things", lambda *_: [Thing(1, (disc,))])
    _, coverage = disc.draw(SIZE)
    assert ((coverage > 0) & (coverage < 1)).any()
    labels = scene().labels()
    assert set(np.unique(labels)) == {0, 1}
    assert (labels == 1).sum() == pytest.approx(np.pi * (0.85 * 15) ** 2, rel=0.03)
