"""``save_best`` by the metrics of our tasks, whatever else metrics give."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mmengine.runner import ValLoop

from mmsnnet.engine.hooks.best_metric_hook import BestMetricHook
from mmsnnet.errors import SettingError


class Saves:
    """As much of a runner as the hook looks at when it saves the best checkpoint."""

    def __init__(self) -> None:
        self.epoch, self.iter = 0, 5
        self.val_loop = object.__new__(ValLoop)
        self.logger = logging.getLogger("saves")
        self.info: dict[str, Any] = {}
        self.message_hub = SimpleNamespace(
            runtime_info=self.info,
            get_info=self.info.get,
            update_info=lambda key, value: self.info.update({key: value}),
        )
        self.saved: list[str] = []

    def save_checkpoint(self, out_dir: str, filename: str, **kwargs: Any) -> None:
        self.saved.append(filename)


def best(metrics: dict[str, Any], folder: Path, **settings: Any) -> list[str]:
    """The checkpoints that are saved for these metrics."""
    hook, runner = BestMetricHook(by_epoch=False, **settings), Saves()
    hook.out_dir, hook.file_backend = str(folder), SimpleNamespace(join_path=lambda *parts: "/".join(parts))
    hook.best_ckpt_path_dict = dict.fromkeys(hook.save_best)
    hook.after_val_epoch(runner, metrics)
    return runner.saved


def rules(names: Any, **settings: Any) -> list[str | None]:
    return BestMetricHook(save_best=names, **settings).rules


def test_rules_follow_from_names() -> None:
    """Those that mmengine cannot infer, too."""
    assert rules(["L/rmse", "L/mIoU", "L/d1", "L/abs_rel"]) == ["less", "greater", "greater", "less"]
    assert rules("L/my_acc") == ["greater"]  # mmengine's own guess
    assert rules(["L/speed", "L/mIoU"], rule=["less", "greater"]) == ["less", "greater"]
    assert rules(["L/speed", "L/mIoU"], rule="greater") == ["greater", "greater"]
    assert rules("L/speed", less_keys=["speed"]) == ["less"]
    assert rules("auto") == [None]


def test_rules_that_do_not_follow() -> None:
    """The error for a missing rule comes before training, after the check of the names."""
    hook = BestMetricHook(save_best=["L/mIoU", "L/speed"])
    runner = SimpleNamespace(hooks=[hook], param_schedulers=None, val_loop=object())
    with pytest.raises(SettingError, match=r"save_best=L/mIoU, L/speed: .*set default_hooks\.checkpoint\.rule"):
        hook.check_validation(runner)
    with pytest.raises(SettingError, match="rule should be 'greater' or 'less', got 'more'"):
        rules("L/mIoU", rule="more")
    assert rules("L/speed", rule="less") == ["less"]


@pytest.mark.parametrize("value", ["bar", np.eye(2), None, [1.0], {"a": 1}, 1j])
def test_what_is_no_number_chooses_nothing(value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = best({"L/mIoU": 2.0, "L/x": value}, tmp_path, save_best=["L/x", "L/mIoU"], rule="greater")
    assert found == ["best_L_mIoU_iter_5.pth"]
    assert "no checkpoint by L/x" in caplog.text and "L/mIoU" in caplog.text


def test_a_metric_that_did_not_come(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its name could not be checked before: the run goes on."""
    assert best({"L/mIoU": 2.0}, tmp_path, save_best="L/speed", rule="less") == []
    assert "no checkpoint by L/speed" in caplog.text


def test_auto_where_no_name_was_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert best({"worst": "bar", "fps": 3.0, "top1": np.float32(2)}, tmp_path, save_best="auto") == [
        "best_top1_iter_5.pth"
    ]
    assert best({"fps": 3.0, "n": 1}, tmp_path, save_best="auto", rule="greater") == ["best_fps_iter_5.pth"]
    assert best({"my_acc": 3.0, "n": 1}, tmp_path, save_best="auto") == ["best_my_acc_iter_5.pth"]
    assert not caplog.text
    assert best({"fps": 3.0}, tmp_path, save_best="auto") == [] and "'auto' keeps no checkpoint" in caplog.text
    assert best({"worst": "bar"}, tmp_path, save_best="auto") == []
