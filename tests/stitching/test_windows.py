"""Windows of tokens: round trips, examples by hand, and the mask of padding."""

import pytest
import torch

from mmsnnet.stitching.windows import from_windows, to_windows, window_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("grid", "window"), [((4, 4), 2), ((4, 4), 4), ((3, 5), 2), ((2, 3), 4), ((1, 1), 3), ((6, 2), 1)]
)
def test_there_and_back(grid: tuple[int, int], window: int, prefix: int) -> None:
    tokens = torch.randn(2, prefix + grid[0] * grid[1], 3)
    windows = to_windows(tokens, grid, window, prefix)
    number = -(-grid[0] // window) * -(-grid[1] // window)
    assert windows.shape == (2, number * (prefix + window**2), 3)
    back = from_windows(windows, grid, window, prefix)
    assert torch.equal(back[:, prefix:], tokens[:, prefix:])
    torch.testing.assert_close(back, tokens)  # a mean of equal copies


def test_by_hand() -> None:
    """A grid of 2 x 3 in windows of 2: the second one has a column of padding. 9 is the prefix token."""
    tokens = torch.tensor([9.0, 1, 2, 3, 4, 5, 6]).reshape(1, 7, 1)
    windows = to_windows(tokens, (2, 3), 2, 1)
    assert windows.flatten().tolist() == [9, 1, 2, 4, 5, 9, 3, 0, 6, 0]
    windows[0, 0] = 5.0
    assert from_windows(windows, (2, 3), 2, 1).flatten().tolist() == [7, 1, 2, 3, 4, 5, 6]


def test_the_mask_by_hand() -> None:
    mask = window_mask((2, 3), 2, 1, CPU)
    assert mask.shape == (2, 1, 1, 5)
    assert mask.flatten().tolist() == [True] * 5 + [True, True, False, True, False]


@pytest.mark.parametrize("prefix", [0, 2])
def test_no_mask_without_padding(prefix: int) -> None:
    assert window_mask((4, 6), 2, prefix, CPU) is None


def test_a_mask_made_in_inference_mode_serves_training() -> None:
    window_mask.cache_clear()
    with torch.inference_mode():
        window_mask((3, 3), 2, 1, CPU)
    assert not window_mask((3, 3), 2, 1, CPU).is_inference()
