"""Errors that all ranks of a run raise together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.dist import all_gather_object
from torch.utils.data import DataLoader

from mmsnnet.errors import SettingError, UserError


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise the error of one rank on all: the others would wait."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    # Any other exception may not survive pickling.
    is_sent = error is None or isinstance(error, OSError | UserError)
    message = error if is_sent else RuntimeError(f"{type(error).__name__}: {error}")
    errors = [received for received in all_gather_object(message) if received is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]


def compare_loaders(loader: DataLoader, setting: str, same_batches: bool) -> int:
    """Compare the sizes of a data loader on all ranks: where they differ, some would wait forever.

    Args:
        loader: of this rank.
        setting: its name in a config, ``'val_dataloader'`` say.
        same_batches: whether all ranks need the same number of batches, beside the same samples.

    Returns:
        The fewest batches of any rank.

    Raises:
        SettingError: on all ranks.
    """
    counts = all_gather_object((len(loader.dataset), len(loader)))  # type: ignore[arg-type]
    samples, batches = zip(*counts, strict=True)
    if min(samples) < max(samples):
        raise SettingError(
            f"{setting}: some ranks have {min(samples)} samples and some {max(samples)}: give all the same files"
        )
    if same_batches and min(batches) < max(batches):
        raise SettingError(
            f"{setting}: some ranks have {min(batches)} batches and some {max(batches)}: set {setting}.sampler."
            "round_up=True"
        )
    return min(batches)
