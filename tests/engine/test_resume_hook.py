"""A run goes on from a checkpoint of the same run; whatever differs is refused or said, one line each."""

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import FlexibleRunner, Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

import mmsnnet.safe_loading  # noqa: F401  one of the checkpoints is a safetensors file
from mmsnnet.engine import ResumeHook
from mmsnnet.errors import SettingError
from mmsnnet.models import read_model_checkpoint
from mmsnnet.registry import DATASETS, MODELS

NUMBERS = itertools.count()
NAMES = ("background", "road", "house", "tree")


class Head(nn.Module):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.hidden = nn.Linear(width, width)
        self.conv_seg = nn.Linear(width, num_classes)


class TwoLayers(BaseModel):
    """A classifier with mmseg's names. ``dropout`` leaves no trace in its weights."""

    def __init__(self, width: int = 4, num_classes: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, width)
        self.decode_head = Head(width, num_classes)
        self.dropout = dropout

    def forward(self, inputs: list[Tensor], data_samples: Any = None, mode: str = "tensor") -> Any:
        hidden = self.decode_head.hidden(self.backbone(torch.stack(inputs)).relu()).relu()
        return dict(loss=self.decode_head.conv_seg(hidden).square().mean())


class Points(Dataset):
    """Points of named classes. ``data_root`` and ``names`` are of the files that a data set of mmengine would list."""

    def __init__(
        self, length: int = 8, classes: tuple[str, ...] = NAMES, data_root: str = "a", names: str = "{}.jpg"
    ) -> None:
        self.metainfo = dict(classes=classes)
        self.length, self.files = length, f"{data_root}/{names}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(inputs=torch.tensor([index / 4, 1.0]))

    def get_data_info(self, index: int) -> dict[str, str]:
        return dict(img_path=self.files.format(index))


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    made = ((MODELS, TwoLayers), (DATASETS, Points))
    for registry, module in made:
        registry.register_module(module=module)
    yield
    for registry, module in made:
        del registry.module_dict[module.__name__]


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config with changes by dotted keys."""
    for key, value in changes.items():
        inner = config
        *path, last = key.split(".")
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return config


def make_config(folder: Path, **changes: Any) -> dict[str, Any]:
    return merged(
        dict(
            model=dict(type="TwoLayers"),
            work_dir=str(folder),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                dataset=dict(type="Points"),
                sampler=dict(type="DefaultSampler", shuffle=True),
                collate_fn=dict(type="pseudo_collate"),
            ),
            train_cfg=dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=6),
            optim_wrapper=dict(
                type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.1, weight_decay=0.05, fused=True)
            ),
            param_scheduler=[dict(type="PolyLR", power=1.0, end=6, by_epoch=False)],
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=3)),
            randomness=dict(seed=3),
            env_cfg=dict(),
            experiment_name=f"resume_hook_{next(NUMBERS)}",
            default_scope="mmsnnet",
            log_level="ERROR",
        ),
        changes,
    )


def make_runner(folder: Path, kind: type = Runner, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = make_config(folder, **{key.replace("__", "."): value for key, value in changes.items()})
    return kind.from_cfg(config)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six iterations, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    make_runner(folder).train()
    return folder


@pytest.fixture
def checkpoint(whole_run: Path) -> dict[str, Any]:
    """The checkpoint of the middle, to be changed and saved elsewhere."""
    return torch.load(whole_run / "iter_3.pth", weights_only=False)


Resume = Callable[..., tuple[Any, list[str]]]


@pytest.fixture
def resume(whole_run: Path, tmp_path: Path) -> Resume:
    """``resume(...)``: goes on from the checkpoint of the middle, or another one, with changes to the config; returns
    the runner and what it warned of."""

    def run(source: Any = None, kind: type = Runner, resume: bool = True, **changes: Any) -> tuple[Any, list[str]]:
        if isinstance(source, dict):
            path = tmp_path / "changed.pth"
            torch.save(source, path)
        else:
            path = source or whole_run / "iter_3.pth"
        made = make_runner(tmp_path / "work", kind, load_from=str(path), resume=resume, **changes)
        warned: list[str] = []
        # What mmengine says by itself is not counted.
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: warned.append(record.getMessage())
        made.logger.handlers = [handler]
        made.logger.setLevel(logging.WARNING)
        made.train()
        own = [text for text in warned if "mmengine" not in text and "FileClient" not in text]
        return made, own

    return run


def test_a_run_that_differs_in_nothing_goes_on_in_silence(resume: Resume, whole_run: Path) -> None:
    for kind in (Runner, FlexibleRunner):
        runner, warned = resume(kind=kind, train_dataloader__dataset__data_root="moved")
        assert warned == []
        expected = torch.load(whole_run / "iter_6.pth", weights_only=False)["state_dict"]
        assert all(torch.equal(value, expected[name]) for name, value in runner.model.state_dict().items())


CURE = r"without --resume starts a new run from its weights$"
REFUSED = {
    "more classes": (
        dict(model__num_classes=7),
        r"decode_head\.num_classes: the checkpoint's decode_head\.conv_seg is for 4 classes, the config's for 7\.",
    ),
    "fewer classes": (
        dict(model__num_classes=2),
        r"decode_head\.num_classes: the checkpoint's decode_head\.conv_seg is for 4 classes, the config's for 2\.",
    ),
    # As many channels as there are classes, which is no number of classes.
    "another width": (
        dict(model__width=6),
        r"of another shape: backbone\.weight \(4, 2\) instead of \(6, 2\), .* and 2 more",
    ),
    "another order of classes": (
        dict(train_dataloader__dataset__classes=("background", "house", "road", "tree")),
        r"train_dataloader\.dataset: class 1 is 'road' in the checkpoint and 'house' by the config\.",
    ),
    "a class more": (
        dict(train_dataloader__dataset__classes=(*NAMES, "sky")),
        r"trained on 4 classes, .* has 5; class 4 is missing in the checkpoint and 'sky' by the config\.",
    ),
    "SGD": (
        dict(optim_wrapper__optimizer=dict(type="SGD", lr=0.1)),
        r"optim_wrapper\.optimizer\.type: the checkpoint's is AdamW, the config's SGD\.",
    ),
    "Adam, whose state has the same names": (
        dict(optim_wrapper__optimizer=dict(type="Adam", lr=0.1)),
        r"optim_wrapper\.optimizer\.type: the checkpoint's is AdamW, the config's Adam\.",
    ),
    "groups of parameters": (
        dict(optim_wrapper__paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0)),
        r"optim_wrapper: the checkpoint has 1 groups of parameters, the config makes 6",
    ),
    "no schedule": (
        dict(param_scheduler=None),
        r"param_scheduler: the checkpoint has 1 schedule \(PolyLR\), the config no schedule\.",
    ),
    "a warmup more": (
        dict(param_scheduler=[dict(type="LinearLR", by_epoch=False, end=2), dict(type="PolyLR", by_epoch=False)]),
        r"param_scheduler: the checkpoint has 1 schedule \(PolyLR\), the config 2 schedules \(LinearLR, PolyLR\)\.",
    ),
    "a schedule of another type": (
        dict(param_scheduler=[dict(type="CosineAnnealingLR", by_epoch=False, end=6)]),
        r"param_scheduler\[0\]\.type: the checkpoint's is PolyLR, the config's CosineAnnealingLR\.",
    ),
}


@pytest.mark.parametrize("difference", REFUSED)
def test_what_a_run_cannot_go_on_with_is_refused_in_one_line(difference: str, resume: Resume, tmp_path: Path) -> None:
    changes, message = REFUSED[difference]
    with pytest.raises(SettingError, match=message) as caught:
        resume(**changes)
    assert "\n" not in str(caught.value) and "cannot be resumed with this config" in str(caught.value)
    with pytest.raises(SettingError, match=CURE):
        resume(**changes)
    assert not list((tmp_path / "work").glob("*.pth"))


def test_all_that_keeps_a_run_from_going_on_is_in_one_message(resume: Resume) -> None:
    with pytest.raises(SettingError) as caught:
        resume(model__num_classes=5, train_dataloader__dataset__classes=(*NAMES, "sky"))
    assert "decode_head.num_classes" in str(caught.value) and "'sky'" in str(caught.value)
    with pytest.raises(SettingError) as caught:
        resume(optim_wrapper__optimizer=dict(type="SGD", lr=0.1), param_scheduler=None)
    assert "optimizer.type" in str(caught.value) and "no schedule" in str(caught.value)


KEPT = {
    "learning rate": (
        dict(optim_wrapper__optimizer__lr=0.01),
        "optim_wrapper.optimizer.lr: the checkpoint's 0.1 is kept, the config's 0.01 is not",
    ),
    "weight decay": (
        dict(optim_wrapper__optimizer__weight_decay=0.5),
        "optim_wrapper.optimizer.weight_decay: the checkpoint's 0.05 is kept, the config's 0.5 is not",
    ),
    "betas": (
        dict(optim_wrapper__optimizer__betas=(0.8, 0.999)),
        "optim_wrapper.optimizer.betas: the checkpoint's (0.9, 0.999) is kept, the config's (0.8, 0.999) is not",
    ),
    "fused": (
        dict(optim_wrapper__optimizer__fused=False),
        "optim_wrapper.optimizer.fused: the checkpoint's True is kept, the config's False is not",
    ),
    "end of the schedule": (
        dict(param_scheduler=[dict(type="PolyLR", power=1.0, end=12, by_epoch=False)]),
        "param_scheduler[0].end: the checkpoint's 6 is kept, the config's 12 is not",
    ),
    "power of the schedule": (
        dict(param_scheduler=[dict(type="PolyLR", power=0.5, end=6, by_epoch=False)]),
        "param_scheduler[0].power: the checkpoint's 1.0 is kept, the config's 0.5 is not",
    ),
    "seed": (
        dict(randomness__seed=4),
        "randomness.seed: the checkpoint's 3 is kept, the config's 4 is not",
    ),
}


@pytest.mark.parametrize("difference", KEPT)
def test_what_the_checkpoint_keeps_is_said(difference: str, resume: Resume, whole_run: Path) -> None:
    changes, message = KEPT[difference]
    runner, warned = resume(**changes)
    ours, cure = (text for text in warned if "value of random seed" not in text)
    assert ours == message and "load_from=" in cure and "without --resume" in cure
    expected = torch.load(whole_run / "iter_6.pth", weights_only=False)["state_dict"]
    for name, value in runner.model.state_dict().items():  # as said, the run is the one that was not interrupted
        torch.testing.assert_close(value, expected[name])


CONFIGS = {
    "number of samples": (
        dict(train_dataloader__dataset__length=6),
        r"train_dataloader\.dataset: goes on with the config's 6 samples \(.*\), the checkpoint's was 8 samples \(",
    ),
    "other files": (
        dict(train_dataloader__dataset__names="image_{}.jpg"),
        r"train_dataloader\.dataset: goes on with the config's 8 samples \(.*\), the checkpoint's was 8 samples \(",
    ),
    "batch size": (
        dict(train_dataloader__batch_size=4),
        r"train_dataloader\.batch_size: goes on with the config's 4 over all processes, the checkpoint's was 2 over",
    ),
    "order of samples": (
        dict(train_dataloader__sampler__shuffle=False),
        r"config's DefaultSampler\(shuffle=False\), the checkpoint's was DefaultSampler\(shuffle=True\)",
    ),
    "accumulation": (
        dict(optim_wrapper__accumulative_counts=3),
        r"optim_wrapper\.accumulative_counts: goes on with the config's 3, the checkpoint's was 1",
    ),
    "clipping": (
        dict(optim_wrapper__clip_grad=dict(max_norm=1.0)),
        r"optim_wrapper\.clip_grad: goes on with the config's \{'max_norm': 1\.0\}, the checkpoint's was none",
    ),
    "length": (
        dict(train_cfg__max_iters=5),
        r"train_cfg\.max_iters: goes on with the config's 5, the checkpoint's was 6",
    ),
    "epochs": (
        dict(train_cfg=dict(type="mmsnnet.StitchEpochBasedTrainLoop", max_epochs=1)),
        r"train_cfg: goes on with the config's epochs, the checkpoint's was iterations, .* begins with the first epoch",
    ),
    "dropout": (
        dict(model__dropout=0.5),
        r"model\.dropout: goes on with the config's 0\.5, the checkpoint's was None",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("difference", CONFIGS)
def test_what_the_config_replaces_is_said(difference: str, resume: Resume) -> None:
    changes, message = CONFIGS[difference]
    runner, warned = resume(**changes)
    (said,) = [text for text in warned if re.search(message, text)]
    # The toy's own settings of its files and classes are settings, too.
    assert all(
        text == said or re.match(r"train_dataloader\.dataset\.|Checkpoints are written", text) for text in warned
    )
    assert runner.iter > 3


def test_nothing_left_to_train_is_said(resume: Resume, whole_run: Path) -> None:
    for number in (6, 3):
        runner, warned = resume(whole_run / f"iter_{number}.pth", train_cfg__max_iters=number)
        assert runner.iter == number
        assert any(f"nothing is left to train: the checkpoint has {number} iterations" in text for text in warned)


NAN = float("nan")
BY_EPOCH = dict(type="mmsnnet.StitchEpochBasedTrainLoop", max_epochs=3)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("meta.iter", value) for value in (7, 10**9, -5, NAN, 3.0, "3", True, None, torch.tensor(3))),
        *(("meta.epoch", value) for value in (-1, NAN, "0", [])),
        *(("meta.seed", value) for value in (-1, 2**32, 1.5, "3", 10**400)),
        *(("message_hub.runtime_info.best_score", value) for value in ("good", NAN, None)),
        ("message_hub.runtime_info.epoch_began", (0, "0")),
        ("message_hub.runtime_info", 5),
        ("message_hub.log_scalars", None),
        ("message_hub.resumed_keys", [1]),
        ("message_hub.runtime_info", {3: 4}),
        ("ema_state_dict", [1]),
        ("optimizer.base_param_settings", 3),
        ("optimizer.param_groups.0.amsgrad", True),
        ("optimizer.param_groups.0.maximize", "no"),
        ("optimizer.state.0.exp_avg", [1.0]),
        ("param_schedulers.0.step", 1),
        ("message_hub", []),
        ("meta.training", "none"),
        ("meta.training.facts", 3),
        *((f"optimizer.param_groups.0.{key}", NAN) for key in ("lr", "initial_lr", "eps", "weight_decay")),
        *(("optimizer.param_groups.0.lr", value) for value in (-0.1, "0.1", None, 10**400, float("inf"), (1, 2))),
        *(("optimizer.param_groups.0.betas", value) for value in ((0.9, 1.5), (0.9,), 0.9, (0.9, NAN))),
        *(("optimizer.param_groups.0", value) for value in (None, {}, 3)),
        *((f"optimizer.state.0.{key}", value) for key in ("exp_avg", "exp_avg_sq") for value in (NAN, float("inf"))),
        ("optimizer.state.0.exp_avg_sq", -1),
        *((f"optimizer.state.0.{key}", kind) for key in ("exp_avg", "exp_avg_sq") for kind in ("int", "complex64")),
        *(("optimizer.state.0.step", value) for value in (-1, NAN, "1")),
        *((f"param_schedulers.0.{key}", NAN) for key in ("last_step", "_global_step", "end", "base_values", "power")),
        *(("param_schedulers.0.last_step", value) for value in ("1", None, 10**400)),
        *(("param_schedulers.0", value) for value in (None, 3)),
    ],
)
def test_records_that_no_run_writes_are_refused_in_one_line(
    place: str, value: Any, checkpoint: dict[str, Any], resume: Resume
) -> None:
    inner: Any = checkpoint
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    for key in path:
        inner = inner[key]
    before = inner.get(last) if isinstance(inner, dict) else inner[last]
    if isinstance(before, Tensor) and not isinstance(value, list):
        is_moment = last != "step"
        inner[last] = before.to(getattr(torch, value)) if is_moment and isinstance(value, str) else value
        if is_moment and isinstance(value, int | float):
            inner[last] = before + value
    else:
        inner[last] = [value] if isinstance(before, list) and last == "base_values" else value
    with pytest.raises(SettingError) as error:
        resume(checkpoint)
    assert "changed.pth" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(("key", "value"), [("epoch", 4), ("epoch", -1), ("iter", 10**9), ("iter", NAN)])
def test_progress_in_epochs_is_checked_too(key: str, value: Any, tmp_path: Path) -> None:
    hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=True, interval=1))
    make_runner(tmp_path, train_cfg=BY_EPOCH, default_hooks=hooks).train()
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    saved["meta"][key] = value
    torch.save(saved, tmp_path / "changed.pth")
    changes = dict(train_cfg=BY_EPOCH, default_hooks=hooks, load_from=str(tmp_path / "changed.pth"), resume=True)
    with pytest.raises(SettingError, match=rf"meta\.{key}: the checkpoint has"):
        make_runner(tmp_path / "work", **changes).train()


def test_a_run_whose_epochs_became_shorter_goes_on_twice(tmp_path: Path) -> None:
    """Its iterations are then more than its epochs have by the present batches."""
    hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=True, interval=1))
    for end, batch_size in ((2, 1), (3, 4), (4, 4)):
        loop = dict(BY_EPOCH, max_epochs=end)
        changes = dict(train_cfg=loop, default_hooks=hooks, train_dataloader__batch_size=batch_size)
        runner = make_runner(tmp_path, **changes, resume=end > 2)
        runner.train()
        assert runner.epoch == end


@pytest.mark.parametrize("changes_end", [True, False])
def test_a_schedule_that_has_ended_is_said(changes_end: bool, resume: Resume, whole_run: Path) -> None:
    """The run trains nothing more, whether or not the config has another end."""
    end = dict(param_scheduler=[dict(type="PolyLR", power=1.0, end=9, by_epoch=False)]) if changes_end else {}
    runner, warned = resume(whole_run / "iter_6.pth", train_cfg__max_iters=9, **end)
    said = "schedule has ended (at 6): the learning rate is 0 for all 3 iterations that are left"
    assert sum(said in text for text in warned) == 1
    assert any("param_scheduler[0].end" in text for text in warned) == changes_end
    before = torch.load(whole_run / "iter_6.pth", weights_only=False)["state_dict"]
    assert all(torch.equal(value, before[name]) for name, value in runner.model.state_dict().items())


@pytest.mark.parametrize("changes", ["smaller", "larger", "one element", "a matrix for a vector"])
def test_no_state_of_another_shape_reaches_a_fused_kernel(
    changes: str, checkpoint: dict[str, Any], resume: Resume
) -> None:
    """torch would load it and read beyond its end: a segmentation fault, at best."""
    entry = checkpoint["optimizer"]["state"][0]
    assert entry["exp_avg"].shape == (4, 2)
    sizes = {"smaller": (3, 2), "larger": (400, 2), "one element": (1,), "a matrix for a vector": (2, 4)}
    entry["exp_avg"] = torch.zeros(sizes[changes])
    with pytest.raises(SettingError, match=r"exp_avg \(.*\) for backbone\.weight \(4, 2\)\. Set the config"):
        resume(checkpoint)


def test_a_checkpoint_without_records_is_compared_by_its_state(checkpoint: dict[str, Any], resume: Resume) -> None:
    del checkpoint["meta"]["training"]
    changes = dict(optim_wrapper__optimizer__lr=0.01, train_dataloader__batch_size=4, model__dropout=0.5)
    _, warned = resume(checkpoint, **changes)
    assert [text.split(":")[0] for text in warned[:-1]] == ["optim_wrapper.optimizer.lr"]
    for difference in ("more classes", "another order of classes", "SGD", "groups of parameters", "no schedule"):
        with pytest.raises(SettingError):
            resume(checkpoint, **REFUSED[difference][0])
    with pytest.raises(SettingError, match="another one than the config's CosineAnnealingLR"):
        resume(checkpoint, **REFUSED["a schedule of another type"][0])


@pytest.mark.parametrize("part", ["optimizer", "param_schedulers"])
def test_a_checkpoint_without_a_part_is_refused(part: str, checkpoint: dict[str, Any], resume: Resume) -> None:
    """As ``save_best`` writes it. The run would go on with fresh moments, or from the start of the schedule."""
    del checkpoint[part]
    message = {"optimizer": "no optimizer state", "param_schedulers": r"has no schedule, the config 1 schedule"}[part]
    with pytest.raises(SettingError, match=message):
        resume(checkpoint)


@pytest.mark.parametrize("kind", ["safetensors", "converted", "no meta", "published", "of mmcv", "no epoch"])
def test_weights_alone_are_not_resumed(
    kind: str, checkpoint: dict[str, Any], resume: Resume, whole_run: Path, tmp_path: Path
) -> None:
    weights, source = checkpoint["state_dict"], tmp_path / "weights.pth"
    if kind == "safetensors":
        source = source.with_suffix(".safetensors")
        safetensors.torch.save_file(dict(weights), source)
    elif kind == "converted":
        torch.save({"state_dict": weights, "meta": {"mmsnnet_version": "1"}}, source)
    elif kind == "no meta":
        torch.save({"state_dict": weights}, source)
    elif kind == "published":  # by mmengine's hook, with these two of its published_keys
        torch.save({key: checkpoint[key] for key in ("meta", "state_dict")}, source)
    elif kind == "of mmcv":
        torch.save({"state_dict": weights, "meta": {"epoch": 1, "iter": 2}, "optimizer": {}}, source)
    else:
        del checkpoint["meta"]["epoch"]
        torch.save(checkpoint, source)
    for runner in (Runner, FlexibleRunner):
        with pytest.raises(SettingError, match=rf"{source.name}' has weights alone.* leave out --resume, or load_from"):
            resume(source, kind=runner)


def test_averages_come_and_go(resume: Resume, whole_run: Path, tmp_path: Path) -> None:
    """Without ``EMAHook`` a run goes on from the weights that were trained, where mmengine takes the averages."""
    ema = dict(custom_hooks=[dict(type="EMAHook", momentum=0.1)])
    make_runner(tmp_path / "ema", **ema).train()
    source = tmp_path / "ema" / "iter_3.pth"
    _, warned = resume(source, **ema)
    assert warned == []
    runner, warned = resume(source)
    assert [text for text in warned if "EMAHook" in text] == [
        "custom_hooks: the checkpoint has averaged weights, the config has no EMAHook: goes on with the trained "
        "weights, without averages"
    ]
    expected = torch.load(whole_run / "iter_6.pth", weights_only=False)["state_dict"]  # averages change nothing trained
    assert all(torch.equal(value, expected[name]) for name, value in runner.model.state_dict().items())
    with pytest.raises(SettingError, match=r"conv_seg is for 4 classes, the config's for 7"):
        resume(source, model__num_classes=7, **ema)
    changed = torch.load(source, weights_only=False)
    changed["ema_state_dict"]["module.backbone.bias"] = torch.zeros(3)
    with pytest.raises(SettingError, match=r"averaged weights .* backbone\.bias \(3,\) instead of \(4,\)"):
        resume(changed, **ema)


def test_each_of_several_optimizers_is_compared(tmp_path: Path) -> None:
    def run(folder: Path, rate: float = 0.1, kind: type = torch.optim.SGD, **changes: Any) -> tuple[Any, list[str]]:
        runner = make_runner(folder, param_scheduler=None, **changes)
        model = runner.model
        model.train_step = lambda data, optim_wrapper: step(model, data, optim_wrapper)
        runner.optim_wrapper = OptimWrapperDict(
            body=OptimWrapper(torch.optim.AdamW(model.backbone.parameters(), lr=0.1)),
            head=OptimWrapper(kind(model.decode_head.parameters(), lr=rate)),
        )
        warned: list[str] = []
        runner.logger.warning = warned.append
        runner.train()
        return runner, warned

    def step(model: Any, data: Any, wrappers: OptimWrapperDict) -> dict[str, Tensor]:
        losses = model(data["inputs"], mode="loss")
        losses["loss"].backward()
        for wrapper in wrappers.values():
            wrapper.step()
            wrapper.zero_grad()
        return losses

    run(tmp_path / "whole")
    again = dict(load_from=str(tmp_path / "whole" / "iter_3.pth"), resume=True)
    _, warned = run(tmp_path / "same", **again)
    assert [text for text in warned if "checkpoint" in text] == []
    _, warned = run(tmp_path / "rate", rate=0.2, **again)
    said = "optim_wrapper.head.optimizer.lr: the checkpoint's 0.1 is kept, the config's 0.2 is not"
    assert [text for text in warned if "kept" in text] == [said]
    with pytest.raises(SettingError, match=r"optim_wrapper\.head\.optimizer\.type: the checkpoint's is SGD"):
        run(tmp_path / "kind", kind=torch.optim.Adam, **again)
    with pytest.raises(
        SettingError, match=r"has the state of optim_wrapper\.body, optim_wrapper\.head, the config has"
    ):
        make_runner(tmp_path / "one", param_scheduler=None, **again).train()


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["AtomicCheckpointHook", "ResumeHook"])
def test_mmengines_own_loops_compare_with_either_hook(hook: str, tmp_path: Path) -> None:
    stock = dict(train_cfg=dict(type="IterBasedTrainLoop", max_iters=6))
    if hook == "ResumeHook":
        stock["custom_hooks"] = [dict(type="mmsnnet.ResumeHook")]
    else:
        stock["default_hooks__checkpoint__type"] = "mmsnnet.AtomicCheckpointHook"
    make_runner(tmp_path, **stock).train()
    assert torch.load(tmp_path / "iter_6.pth", weights_only=False)["meta"]["training"]["facts"]["train_cfg"]
    again = dict(stock, load_from=str(tmp_path / "iter_3.pth"), resume=True)
    with pytest.raises(SettingError, match="conv_seg is for 4 classes, the config's for 7"):
        make_runner(tmp_path, model__num_classes=7, **again).train()
    with pytest.raises(SettingError, match="the checkpoint's is AdamW, the config's Adam"):
        make_runner(tmp_path, optim_wrapper__optimizer=dict(type="Adam"), **again).train()


def test_records_are_plain(whole_run: Path) -> None:
    def is_plain(value: Any) -> bool:
        if isinstance(value, dict | list):
            return all(map(is_plain, value.values() if isinstance(value, dict) else value))
        return value is None or type(value) in (bool, int, float, str)

    assert is_plain(read_model_checkpoint(whole_run / "iter_3.pth")["meta"]["training"])


@pytest.mark.slow
def test_a_schedule_with_a_function_goes_on(tmp_path: Path) -> None:
    """Its checkpoints would be refused: no code is read."""
    schedule = dict(param_scheduler=[dict(type="OneCycleLR", eta_max=0.2, total_steps=6, by_epoch=False)])
    whole = make_runner(tmp_path, **schedule)
    whole.train()
    resumed = make_runner(tmp_path, load_from=str(tmp_path / "iter_3.pth"), resume=True, **schedule)
    resumed.train()
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_how_a_config_is_written_makes_no_difference(resume: Resume) -> None:
    changes = dict(model=dict(type="mmsnnet.TwoLayers"), train_dataloader__dataset=dict(type=Points, length=8))
    changes["train_dataloader__collate_fn"] = dict(type="mmengine.pseudo_collate")
    changes["optim_wrapper__optimizer"] = dict(type=torch.optim.AdamW, lr=0.1, weight_decay=0.05, fused=True)
    changes["train_dataloader__dataset"] = dict(type=Points)
    assert resume(**changes)[1] == []


def test_weights_of_which_nothing_fits_are_refused(resume: Resume) -> None:
    other = dict(meta={}, state_dict={"encoder.weight": torch.zeros(3), "backbone.weight": torch.zeros(7, 7)})
    with pytest.raises(SettingError) as caught:
        resume(other, resume=False)
    text = str(caught.value)
    assert "changed.pth' fits the model" in text and "\n" not in text
    assert "begins with encoder.weight, backbone.weight; the model with backbone.weight, backbone.bias, " in text
    assert "pretrained=" in text and "prefix=" in text


def test_what_load_from_leaves_out_is_one_warning(resume: Resume, checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"]["backbone.bias"]
    checkpoint["state_dict"]["other"] = torch.zeros(1)
    classes = (*NAMES, "sky", "sea", "sun")
    runner, warned = resume(checkpoint, resume=False, model__num_classes=7, train_dataloader__dataset__classes=classes)
    (said,) = [text for text in warned if text.startswith("load_from:")]
    assert "3 of 6 tensors are loaded from" in said and "missing: backbone.bias (4,)" in said
    assert "left over: other (1,)" in said and "decode_head.conv_seg.weight (4, 4) instead of (7, 4)" in said
    assert runner.iter == 6


def test_load_from_that_fits_says_nothing(resume: Resume, whole_run: Path) -> None:
    _, warned = resume(resume=False)
    assert warned == []


def test_a_runner_that_does_not_train_compares_nothing(whole_run: Path, tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    ResumeHook().after_load_checkpoint(runner, dict(state_dict={"other": torch.zeros(1)}))
