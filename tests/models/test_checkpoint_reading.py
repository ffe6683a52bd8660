"""Checkpoints of a run are read with their loss history, and nothing of them runs."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmsnnet.models import read_model_checkpoint
from tests.models.toy_run import Toy, same, toy_runner


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run, with a checkpoint of each epoch."""
    folder = tmp_path_factory.mktemp("trained")
    with torch.random.fork_rng(devices=[]):
        toy_runner(folder).train()
    return folder


class Gets:
    """What a cleverer one holds: getattr of what it likes, which is on mmengine's list of what is safe."""

    def __init__(self, owner: Any, name: str) -> None:
        self.attribute = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.attribute


def test_all_that_a_runner_writes_is_read(trained: Path) -> None:
    path = trained / "epoch_2.pth"
    expected = torch.load(path, weights_only=False)
    assert {"meta", "state_dict", "message_hub", "optimizer", "param_schedulers", "ema_state_dict"} == set(expected)
    assert len(expected["message_hub"]["log_scalars"]["train/loss"].data[0]) == 4
    found = read_model_checkpoint(path)
    assert same(found, expected)
    history = found["message_hub"]["log_scalars"]["train/loss"]
    assert (
        history.mean() == pytest.approx(sum(history.data[0]) / 4) and history.statistics("max") == history.data[0].max()
    )


def test_a_history_changes_no_other(tmp_path: Path) -> None:
    """A loss history brings numbers along, and neither methods of the class nor attributes."""

    class Hostile:
        def __init__(self, **state: Any) -> None:
            self.state = state

        def __reduce__(self) -> tuple[Any, ...]:
            return HistoryBuffer, (), self.state

    numbers = dict(_log_history=np.array([1.0, 3.0]), _count_history=np.array([1, 1]), max_length=10)
    hostile = Hostile(**numbers, statistics_methods={"mean": HistoryBuffer.max}, max=HistoryBuffer.min)
    scalars = {"log_scalars": {"loss": hostile}}
    torch.save({"state_dict": Toy().state_dict(), "message_hub": scalars}, tmp_path / "w.pth")
    found = read_model_checkpoint(tmp_path / "w.pth")["message_hub"]["log_scalars"]["loss"]
    for history in (HistoryBuffer([1.0, 3.0], [1, 1]), found):
        assert type(history) is HistoryBuffer and history.statistics("mean") == 2.0 and history.max() == 3.0
    assert "max" not in vars(found)


@pytest.mark.parametrize(
    ("owner", "name"), [(HistoryBuffer, "__init__"), (HistoryBuffer, "__subclasses__"), (OrderedDict, "fromkeys")]
)
def test_getattr_reaches_the_history_s_own_methods_alone(owner: Any, name: str, tmp_path: Path) -> None:
    def written(attribute: Gets) -> Path:
        torch.save({"state_dict": Toy().state_dict(), "meta": {"it": attribute}}, tmp_path / "gets.pth")
        return tmp_path / "gets.pth"

    assert read_model_checkpoint(written(Gets(HistoryBuffer, "mean")))["meta"]["it"] is None  # nothing is looked up
    with pytest.raises(ValueError, match=r"gets\.pth.*refused.*getattr"):
        read_model_checkpoint(written(Gets(owner, name)))


@pytest.mark.parametrize("where", ["bare", "state_dict"])
def test_weights_alone_have_an_empty_meta(where: str, tmp_path: Path) -> None:
    """mmengine's hooks look for the weights under 'state_dict', and mmseg for a 'meta'."""
    weights = dict(Toy().state_dict())
    torch.save(weights if where == "bare" else {"state_dict": weights}, tmp_path / "w.pth")
    found = read_model_checkpoint(tmp_path / "w.pth")
    assert same(found, {"state_dict": weights, "meta": {}})


def test_a_history_without_numbers_is_an_empty_history(tmp_path: Path) -> None:
    class Empty:
        def __reduce__(self) -> tuple[Any, ...]:
            return HistoryBuffer, ()

    torch.save({"state_dict": Toy().state_dict(), "message_hub": {"log_scalars": {"a": Empty()}}}, tmp_path / "w.pth")
    history = read_model_checkpoint(tmp_path / "w.pth")["message_hub"]["log_scalars"]["a"]
    assert type(history) is HistoryBuffer and len(history.data[0]) == 0
