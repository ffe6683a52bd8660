"""Rooms: depth against plane geometry written out, what hides what, and what the sensor does not see."""

import numpy as np
import pytest

from mmsnnet.datasets import make_room, scene_rng
from mmsnnet.datasets.procedural.rooms import BASELINE, FARTHEST, FOCAL, NEAREST, Ball, Box, Camera, cast, depth_map
from mmsnnet.datasets.procedural.rooms import _furnish as furnish

SIZE = (48, 64)
# 4 m wide, 3 m high, 6 m long; its floor is y = 0 and the wall behind the camera z = 0.
ROOM = Box((0, 1.5, 3), (2, 1.5, 3), hollow=True)
FRONT = Camera((0, 1.2, 0.5))


def columns_and_rows() -> tuple[np.ndarray, np.ndarray]:
    """What the middles of the pixels are right of and above the optical axis, at a distance of 1 along it."""
    x = (np.arange(64) + 0.5 - 32) / (FOCAL * 64)
    y = (24 - np.arange(48) - 0.5) / (FOCAL * 64)
    return np.broadcast_to(x, SIZE), np.broadcast_to(y[:, None], SIZE)


def test_an_empty_room_is_as_deep_as_its_planes():
    """Looking straight ahead, each wall is where its own plane z = d / slope is; the nearest of them is seen."""
    x, y = columns_and_rows()
    with np.errstate(divide="ignore"):
        side, floor, ceiling = 2 / abs(x), np.where(y < 0, 1.2 / -y, np.inf), np.where(y > 0, 1.8 / y, np.inf)
    wanted = np.minimum.reduce([side, floor, ceiling, np.full(SIZE, 5.5)])
    np.testing.assert_array_equal(depth_map([ROOM], FRONT, SIZE), np.round(1000 * wanted))


def test_depth_is_along_the_axis_not_along_the_ray():
    depth = depth_map([ROOM], FRONT, SIZE)
    assert set(depth[22:26].ravel()) >= {5500}
    assert depth[24, 32] == depth[24, 28] == 5500


def test_a_camera_that_looks_down_sees_the_floor_where_trigonometry_has_it():
    pitch = 0.3
    depth = depth_map([ROOM], Camera((0, 1.2, 0.5), pitch=pitch), SIZE)
    y = columns_and_rows()[1][:, 32]
    # The ray of a row falls by sin - y cos and leads on by cos + y sin, for each metre along the optical axis.
    to_floor = 1.2 / (np.sin(pitch) - y * np.cos(pitch))
    on_floor = (to_floor > 0) & (0.5 + to_floor * (np.cos(pitch) + y * np.sin(pitch)) < 6)
    assert 20 < on_floor.sum() < 48
    np.testing.assert_array_equal(depth[on_floor, 32], np.round(1000 * to_floor[on_floor]))


def test_a_camera_that_turns_right_sees_the_right_wall_nearer():
    depth = depth_map([ROOM], Camera((0, 1.2, 0.5), yaw=0.4), SIZE)
    assert depth[24, 60] < depth[24, 4]
    # The wall x = 2, for the ray of column 60: x' = x cos + sin for each metre along the axis.
    x = columns_and_rows()[0][24, 60]
    assert depth[24, 60] == round(1000 * 2 / (x * np.cos(0.4) + np.sin(0.4)))


def test_the_nearer_object_hides_the_farther():
    near, far = Box((0, 1.2, 2.0), (0.3, 0.3, 0.2)), Box((0, 1.2, 4.0), (0.9, 0.9, 0.2))
    for solids in ([ROOM, near, far], [ROOM, far, near]):
        distances, nearest = cast(solids, np.array(FRONT.position), FRONT.directions(SIZE))
        distances, nearest = distances.reshape(SIZE), nearest.reshape(SIZE)
        x, y = columns_and_rows()
        # Their front faces are 1.3 and 3.3 m ahead.
        on_near = np.maximum(abs(x), abs(y)) < 0.3 / 1.3
        on_far = (np.maximum(abs(x), abs(y)) < 0.9 / 3.3) & ~on_near
        assert on_near.any() and on_far.any()
        np.testing.assert_allclose(distances[on_near], 1.3, rtol=1e-9)
        np.testing.assert_allclose(distances[on_far], 3.3, rtol=1e-9)
        assert (nearest[on_near] == solids.index(near)).all() and (nearest[on_far] == solids.index(far)).all()


def test_a_ball_is_nearest_in_its_middle():
    ball = Ball((0, 1.2, 2.5), 0.5)
    distance, which = cast([ROOM, ball], np.array(FRONT.position), np.array([[0.0], [0.0], [1.0]]))
    assert distance[0] == pytest.approx(2.5 - 0.5 - 0.5) and which[0] == 1
    # A ray that leads past it at twice its radius does not meet it.
    _, which = cast([ROOM, ball], np.array(FRONT.position), np.array([[1.0], [0.0], [2.0]]))
    assert which[0] == 0


def test_a_turned_box_has_its_edge_where_it_was_turned_to():
    """A cube turned by an eighth of a turn shows its edge, half a diagonal before its middle."""
    cube = Box((0, 1.2, 3), (0.5, 0.5, 0.5), angle=np.pi / 4)
    distance, _ = cast([ROOM, cube], np.array(FRONT.position), np.array([[1e-9], [0.0], [1.0]]))
    assert distance[0] == pytest.approx(2.5 - 0.5 * np.sqrt(2))


def test_every_measured_point_lies_on_a_surface():
    """Led back through the camera, with numbers rather than with the module's rays, each point is on the room's walls,
    on a box's side or on a ball, to the millimetre that the file holds."""
    for index in range(6):
        solids, camera = furnish(scene_rng(0, "train", index))
        depth = depth_map(solids, camera, SIZE) / 1000
        x, y = columns_and_rows()
        across, up, ahead = depth * x, depth * y, depth
        cos, sin = np.cos(camera.pitch), np.sin(camera.pitch)
        up, ahead = cos * up - sin * ahead, cos * ahead + sin * up
        cos, sin = np.cos(camera.yaw), np.sin(camera.yaw)
        across, ahead = cos * across + sin * ahead, cos * ahead - sin * across
        points = np.stack([across, up, ahead]) + np.array(camera.position)[:, None, None]
        gaps = []
        for solid in solids:
            from_middle = points - np.array(solid.centre)[:, None, None]
            if isinstance(solid, Ball):
                gaps.append(abs(np.linalg.norm(from_middle, axis=0) - solid.radius))
                continue
            turned = np.exp(1j * solid.angle) * (from_middle[0] + 1j * from_middle[2])
            own = np.stack([turned.real, from_middle[1], turned.imag])
            gaps.append(abs((abs(own) - np.array(solid.half)[:, None, None]).max(axis=0)))
        measured = depth > 0
        assert measured.mean() > 0.9
        assert np.minimum.reduce(gaps)[measured].max() < 2e-3


def test_what_is_too_near_or_too_far_is_not_measured():
    long_room = Box((0, 1.5, 6), (2, 1.5, 6), hollow=True)
    depth = depth_map([long_room, Box((0, 1.2, 0.9), (0.02, 0.02, 0.02))], FRONT, SIZE)
    x, y = columns_and_rows()
    # The wall at 11.5 m is beyond reach; the small box is 0.38 m away.
    assert (depth[(abs(x) < 0.17) & (abs(y) < 0.1)] == 0).all()
    assert depth[depth > 0].min() >= 1000 * NEAREST and depth.max() <= 1000 * FARTHEST
    assert (depth > 0).mean() > 0.8


def test_the_projectors_shadow_lies_left_of_what_casts_it():
    """The projector sits to the right, so that a strip of the wall to the left of a box is seen, but not lit: as wide
    as the similar triangles of box and wall make it."""
    size = (120, 160)
    box = Box((0, 1.2, 2.0), (0.3, 0.3, 0.2))  # 1.3 m ahead; the wall is 5.5 m ahead
    depth = depth_map([ROOM, box], FRONT, size)[60]
    focal = FOCAL * 160
    edge = 80 - focal * 0.3 / 1.3
    # The light past the edge at 1.3 m goes on to the wall, away from the projector.
    shadow = 80 + focal * (-0.3 - (0.3 + BASELINE) * (5.5 - 1.3) / 1.3) / 5.5
    unknown = np.flatnonzero(depth == 0)
    assert abs(unknown[0] - shadow) <= 1 and abs(unknown[-1] + 1 - edge) <= 1
    assert len(unknown) == unknown[-1] - unknown[0] + 1
    assert (depth[80:] > 0).all()


def test_rooms_have_the_promised_form():
    for size in ((32, 32), SIZE, (40, 120)):
        image, depth = make_room(scene_rng(0, "train", 0), size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8 and image.std() > 1
        assert depth.shape == size and depth.dtype == np.uint16


def test_rooms_are_indoors_and_differ():
    made = [make_room(scene_rng(0, "train", index), SIZE) for index in range(20)]
    middles = [np.median(depth[depth > 0]) for _, depth in made]
    assert min(middles) > 1000 and max(middles) < 8000 and np.std(middles) > 500
    assert len({image.tobytes() for image, _ in made}) == 20


def test_a_room_is_a_function_of_its_source_alone():
    first, second = (make_room(scene_rng(5, "val", 2), SIZE) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_lamp_lights_what_faces_it(monkeypatch):
    """A ball lit from above is brighter on top than below: the picture goes with the depth."""
    monkeypatch.setattr(
        "mmsnnet.datasets.procedural.rooms._furnish", lambda rng: ([ROOM, Ball((0, 1.0, 2.5), 0.6)], FRONT)
    )
    x, y = columns_and_rows()
    y = y + 0.2 / 2  # the ball's middle is 0.2 m below the camera, 2 m ahead
    above = (np.hypot(x, y) < 0.25) & (y > 0.1)
    below = (np.hypot(x, y) < 0.25) & (y < -0.1)
    pictures = [make_room(scene_rng(0, "train", index), SIZE)[0].astype(float) for index in range(10)]
    assert np.mean([picture[above].mean() - picture[below].mean() for picture in pictures]) > 10


def test_too_small_a_room_is_refused():
    with pytest.raises(ValueError, match=r"at least 32.*16 x 64"):
        make_room(scene_rng(0, "train", 0), (16, 64))
