"""What is logged without waiting for the device is what mmengine logs, to the bit, whoever reads it and when."""

import copy
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmsnnet.engine import ConsistencyHook, DeferredRuntimeInfoHook
from mmsnnet.engine.hooks import deferred_runtime_info_hook
from mmsnnet.engine.hooks.device_scalars import DeviceScalars

TIMES = ("time", "data_time", "eta", "memory")
HOOKS = {"mmengine's": "RuntimeInfoHook", "deferred": "mmsnnet.DeferredRuntimeInfoHook"}


class Numbers(Dataset):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Tensor:
        return torch.linspace(-1, 1, 4) * (index + 1)


class Toy(BaseModel):
    """Logs a loss of each dtype, a list of losses, one that comes and goes, and numbers that are none."""

    def __init__(self, raises_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.raises_at = raises_at
        self.calls = 0

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        self.calls += 1
        if self.calls == self.raises_at:
            raise RuntimeError("the loader died")
        y = self.layer(inputs)
        if mode == "predict":
            return [y]
        losses = dict(
            loss_a=(y**2).mean(), loss_b=[y.abs(), y.half()], acc=torch.tensor([self.calls * 1.1]), sum=y.double().sum()
        )
        return losses | (dict(loss_rare=y.bfloat16().abs()) if self.calls % 3 == 0 else {})


class Reader(Hook):
    """Reads a loss in the middle of the run, as any hook may."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter in (4, 5, 11):
            self.seen.append(float(runner.message_hub.get_scalar("train/loss").mean(3)))


def train(kind: str, folder: Path, interval: int, by_epoch: bool, resume: bool = False, **model: Any) -> Runner:
    torch.manual_seed(0)
    reader = Reader()
    runner = Runner(
        Toy(**model),
        str(folder / f"{kind}"),
        train_dataloader=dict(
            batch_size=2,
            dataset=Numbers(),
            sampler=dict(type="DefaultSampler" if by_epoch else "InfiniteSampler", shuffle=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=4) if by_epoch else dict(by_epoch=False, max_iters=14),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01), clip_grad=dict(max_norm=0.1)),
        param_scheduler=dict(type="LinearLR", start_factor=0.5, by_epoch=False, end=9),
        default_hooks=dict(
            runtime_info=dict(type=HOOKS[kind]),
            logger=dict(type="LoggerHook", interval=interval, ignore_last=False),
            checkpoint=dict(type="CheckpointHook", interval=1 if by_epoch else 5, by_epoch=by_epoch),
        ),
        custom_hooks=[reader],
        log_processor=dict(by_epoch=by_epoch, window_size=4, mean_pattern=r".*(loss|time|grad_norm).*"),
        randomness=dict(seed=0),
        experiment_name=f"{kind} {folder.name} {resume}",
        resume=resume,
        log_level="ERROR",
    )
    runner.reader = reader
    try:
        runner.train()
    except RuntimeError as error:
        assert "the loader died" in str(error)
    return runner


def scalars(hub: MessageHub) -> list[tuple[str, Any]]:
    """Every history of training but the times, in the order of the log: dtypes and bits."""
    return [
        (name, [(values.dtype, values.tobytes()) for values in history.data])
        for name, history in hub.log_scalars.items()
        if not name.endswith(TIMES)
    ]


def logged(runner: Runner) -> list[dict[str, Any]]:
    """What the visualizer wrote, times left out."""
    files = sorted(Path(runner.work_dir).glob("*/vis_data/scalars.json"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("interval", [1, 3, 50])
@pytest.mark.parametrize("by_epoch", [False, True], ids=["iterations", "epochs"])
def test_what_is_logged_is_what_mmengine_logs(tmp_path: Path, interval: int, by_epoch: bool) -> None:
    theirs, ours = (train(kind, tmp_path, interval, by_epoch) for kind in HOOKS)
    assert any(isinstance(hook, DeferredRuntimeInfoHook) for hook in ours.hooks)
    assert logged(theirs) == logged(ours) and logged(ours)
    assert theirs.reader.seen == ours.reader.seen and len(ours.reader.seen) == 3
    assert scalars(theirs.message_hub) == scalars(ours.message_hub)
    names = [name for name, _ in scalars(ours.message_hub)]
    assert {"train/lr", "train/grad_norm", "train/loss", "train/loss_rare", "train/acc"} <= set(names)


@pytest.mark.parametrize("by_epoch", [False, True], ids=["iterations", "epochs"])
def test_a_run_that_dies_and_goes_on_logs_the_same(tmp_path: Path, by_epoch: bool) -> None:
    checkpoints = []
    for kind in HOOKS:
        dead = train(kind, tmp_path, 50, by_epoch, raises_at=11)
        checkpoints.append((scalars(dead.message_hub), logged(dead)))
    assert checkpoints[0] == checkpoints[1]
    theirs, ours = (train(kind, tmp_path, 3, by_epoch, resume=True) for kind in HOOKS)
    assert ours.iter == (16 if by_epoch else 14)
    assert scalars(theirs.message_hub) == scalars(ours.message_hub)
    assert logged(theirs) == logged(ours)


def test_checkpoints_hold_mmengines_own_histories(tmp_path: Path) -> None:
    runners = [train(kind, tmp_path, 50, by_epoch=False) for kind in HOOKS]
    hubs = []
    for runner in runners:
        saved = torch.load(Path(runner.work_dir) / "iter_10.pth", weights_only=False)["message_hub"]["log_scalars"]
        assert {type(history) for history in saved.values()} == {HistoryBuffer}
        hubs.append(scalars(SimpleNamespace(log_scalars=saved)))
        assert len(saved["train/loss"].data[0]) == 10
    assert hubs[0] == hubs[1]


def test_a_copy_and_a_pickle_are_mmengines() -> None:
    hook, hub = DeferredRuntimeInfoHook(), MessageHub("copied")
    for value in (1.0, 2.0, 3.0):
        hook.after_train_iter(SimpleNamespace(message_hub=hub), 0, outputs=dict(loss=torch.tensor(value)))
    history = hub.get_scalar("train/loss")
    for twin in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert type(twin) is HistoryBuffer and twin.mean() == 2 and twin.data[0].tolist() == [1, 2, 3]
    assert history.statistics("max") == 3 and history.min(2) == 2 and history.current() == 3


@pytest.mark.parametrize(
    "values",
    [
        [torch.tensor(0.1), 0.2, np.float32(0.3), torch.tensor([[0.4]])],
        [torch.tensor(3), torch.tensor(4), 5, torch.tensor(0.5, dtype=torch.float64)],
        [True, torch.tensor(False), torch.tensor(7, dtype=torch.uint8)],
        [torch.tensor(2**60 + 1), torch.tensor(2**60 + 3)],
        [torch.tensor(float("nan")), torch.tensor(float("inf"), dtype=torch.bfloat16), np.array([-0.0])],
    ],
    ids=["floats", "integers", "bools", "large", "special"],
)
def test_any_number_comes_out_as_from_mmengine(values: list[Any]) -> None:
    hubs = MessageHub("theirs"), MessageHub("ours")
    for hook, hub in zip((RuntimeInfoHook(), DeferredRuntimeInfoHook()), hubs, strict=True):
        for value in values:
            hook.after_train_iter(SimpleNamespace(message_hub=hub), 0, outputs=dict(x=value))
    assert scalars(hubs[0]) == scalars(hubs[1])


def test_what_is_no_number_is_refused() -> None:
    scalars = DeviceScalars()
    with pytest.raises(TypeError, match=r"loss is one number.*Tensor of shape \(2,\)"):
        scalars.put(dict(loss=torch.zeros(2)))
    with pytest.raises(TypeError, match=r"loss is one number.*str"):
        scalars.put(dict(loss="0.1"))


def test_a_loss_is_copied_and_lets_its_graph_go() -> None:
    """CUDA graphs write the next loss over this one; a loss that held its graph would hold the activations."""
    scalars, weight = DeviceScalars(), torch.ones(3, requires_grad=True)
    big = weight * 2
    scalars.put(dict(loss=big[0]))
    with torch.no_grad():
        big.fill_(9)
    assert all(not t.requires_grad and t.untyped_storage().nbytes() == 4 for v in scalars._copies.values() for t in v)
    assert scalars.fetch() == [dict(loss=2.0)] and scalars.fetch() == []


def test_histories_keep_their_greatest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    hubs = MessageHub("theirs"), MessageHub("ours")
    for hook, hub in zip((RuntimeInfoHook(), DeferredRuntimeInfoHook()), hubs, strict=True):
        hub.log_scalars["train/loss"] = HistoryBuffer([0.5], [1], max_length=4)
        for value in range(9):
            hook.after_train_iter(SimpleNamespace(message_hub=hub), 0, outputs=dict(loss=torch.tensor(float(value))))
    assert scalars(hubs[0]) == scalars(hubs[1])
    assert hubs[1].get_scalar("train/loss").data[0].tolist() == [5, 6, 7, 8]


def test_a_run_that_nobody_logs_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_runtime_info_hook, "MOST_STEPS", 10)
    hook, hub = DeferredRuntimeInfoHook(), MessageHub("unread")
    for _ in range(25):
        hook.after_train_iter(SimpleNamespace(message_hub=hub), 0, outputs=dict(loss=torch.tensor(1.0)))
        assert len(hook._pending) < 10


def test_another_writer_keeps_the_order() -> None:
    hook, hub = DeferredRuntimeInfoHook(), MessageHub("shared")
    for value in range(4):
        hook.after_train_iter(SimpleNamespace(message_hub=hub), 0, outputs=dict(loss=torch.tensor(value)))
        hub.update_scalar("train/loss", value + 0.5)
    assert hub.get_scalar("train/loss").data[0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]


# No step waits for the device


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what reads a tensor's values, and so would wait for a GPU."""
    calls: Counter[str] = Counter()
    names = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero", "__array__")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(Tensor, name, _counting(name, getattr(Tensor, name), calls))
        yield calls


def _counting(name: str, method: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    def spy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return method(self, *args, **kwargs)

    return spy


def test_iterations_read_no_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone_config: Callable[..., dict[str, Any]]
) -> None:
    """Between two logs and checks: by mmengine's hook each does."""
    # mmengine's own adds up paddings in a tensor, which is on the CPU wherever the model is.
    stack = "mmengine.model.base_model.data_preprocessor.stack_batch"
    monkeypatch.setattr(stack, lambda images, *_: torch.stack(images))
    found = {}
    for kind in HOOKS:
        found[kind] = steps = Steps()
        Runner(
            dict(
                type="mmsnnet.StitchedClassifier",
                backbone=backbone_config(flops_step=1e5),
                num_classes=5,
                data_preprocessor=dict(type="ImgDataPreprocessor", mean=[127.5] * 3, std=[60.0] * 3),
            ),
            str(tmp_path / kind),
            train_dataloader=dict(
                batch_size=2,
                dataset=Pictures(),
                sampler=dict(type="InfiniteSampler"),
                collate_fn=dict(type="pseudo_collate"),
            ),
            train_cfg=dict(by_epoch=False, max_iters=12),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01), clip_grad=dict(max_norm=0.1)),
            default_hooks=dict(
                runtime_info=dict(type=HOOKS[kind]), logger=dict(type="LoggerHook", interval=6), checkpoint=None
            ),
            custom_hooks=[
                dict(type="mmsnnet.StitchInitHook", num_images=8),
                dict(type="mmsnnet.StitchLogHook"),
                ConsistencyHook(interval=4),
                steps,
            ],
            default_scope="mmsnnet",
            experiment_name=f"reads {kind}",
            log_level="ERROR",
        ).train()
    theirs, ours = (steps.counts for steps in found.values())
    assert len(theirs) == len(ours) == 12 and all(theirs)
    # The first makes the histories, every fourth is checked, every sixth is logged.
    assert [iteration for iteration, calls in enumerate(ours, 1) if calls] == [1, 4, 6, 8, 12]


class Pictures(Dataset):
    def __len__(self) -> int:
        return 32  # one round of the sampler, whose next begins with a permutation on the CPU

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return dict(inputs=image, data_samples=BaseDataElement(gt_label=index % 5))


class Steps(Hook):
    """Counts the reads of each whole iteration, all other hooks included."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.counts: list[Counter[str]] = []

    def before_train(self, runner: Runner) -> None:
        self.begin()

    def begin(self) -> None:
        self.context = counted()
        self.calls = self.context.__enter__()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.context.__exit__(None, None, None)
        self.counts.append(Counter(self.calls))
        if batch_idx + 1 < runner.max_iters:
            self.begin()
