"""Checkpoints of whole models: what mmengine's runner reads them with, what is refused, and what is said of one that
does not fit."""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, BaseModule, ExponentialMovingAverage
from mmengine.runner import CheckpointLoader, Runner, get_state_dict, load_checkpoint
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mmsnnet.errors import DataError
from mmsnnet.models import StitchedBackbone, check_weights, model_weights, read_model_checkpoint, read_weights
from mmsnnet.stitching.anchors.attention import resize_table
from tests.conftest import RunsCode

MakeBackbone = Callable[..., StitchedBackbone]


class Toy(BaseModel):
    """A model of one layer, for a runner to train in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs: list[Tensor], data_samples: Any = None, mode: str = "tensor") -> Any:
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


def toy_runner(work_dir: Path, **settings: Any) -> Runner:
    return Runner(
        Toy(),
        str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=[dict(inputs=torch.ones(2) * index) for index in range(4)],
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.1)),
        param_scheduler=[dict(type="MultiStepLR", milestones=[1]), dict(type="PolyLR", power=0.9, end=2)],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        custom_hooks=[dict(type="EMAHook")],
        experiment_name=work_dir.name,
        default_scope="mmengine",
        log_level="ERROR",
        **settings,
    )


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


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of the toy model with code in it, and the mark that the code would leave."""
    mark, path = tmp_path / "mark", tmp_path / "hostile.pth"
    torch.save({"state_dict": Toy().state_dict(), "meta": RunsCode(mark)}, path)
    torch.load(path, weights_only=False)
    assert mark.exists(), "the code does not run even where it may"
    mark.unlink()
    return path, mark


def same(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same."""
    if isinstance(one, HistoryBuffer):
        return type(other) is HistoryBuffer and all(map(same, one.data, other.data))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool((torch.as_tensor(one) == torch.as_tensor(other)).all()) if hasattr(one, "shape") else one == other


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


def test_a_resumed_run_ends_where_the_whole_one_did(trained: Path, tmp_path: Path) -> None:
    resumed = toy_runner(tmp_path / "resumed", load_from=str(trained / "epoch_1.pth"), resume=True)
    resumed.train()
    expected = torch.load(trained / "epoch_2.pth", weights_only=False)
    assert resumed.epoch == 2
    assert same(read_model_checkpoint(tmp_path / "resumed" / "epoch_2.pth")["optimizer"], expected["optimizer"])


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_runner_loads_safetensors_and_folders(layout: str, tmp_path: Path) -> None:
    """With a hook that looks for the weights under 'state_dict', as in every checkpoint of mmengine's."""
    weights = Toy().state_dict()
    (tmp_path / "hub").mkdir()
    safetensors.torch.save_file(weights, tmp_path / "hub" / "model.safetensors")
    source = tmp_path / "hub" / "model.safetensors" if layout == "file" else tmp_path / "hub"
    runner = toy_runner(tmp_path / "work", load_from=str(source))
    runner.call_hook("before_run")
    runner.load_or_resume()
    assert same(dict(runner.model.state_dict()), dict(weights))


def test_an_init_cfg_loads_the_part_with_a_prefix(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    source, path = make_backbone(), tmp_path / "model.safetensors"
    weights = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    safetensors.torch.save_file(weights, path)
    init_cfg = dict(type="Pretrained", checkpoint=str(path), prefix="backbone.")
    backbone = make_backbone(init_cfg=init_cfg)
    backbone.init_weights()
    assert same(dict(backbone.state_dict()), dict(source.state_dict()))


def test_the_loaders_by_source() -> None:
    def loader(source: str) -> tuple[str, str]:
        found = CheckpointLoader._get_checkpoint_loader(source)
        return found.__module__, found.__name__

    ours = "mmsnnet.models.checkpoint"
    for source in ("a.pth", "/a/b", "~/a", "http", "hf-hub"):
        assert loader(source) == (ours, "load_from_local")
    for source in ("http://a/b.pth", "https://a/b.pth", "hf-hub:owner/name"):
        assert loader(source) == (ours, "load_from_remote")
    storage = ("s3://a", "cluster:s3://a", "petrel://a", "pavi://a")
    zoos = ("torchvision://a", "modelzoo://a", "open-mmlab://a", "openmmlab://a", "mmcls://a")
    for source in (*storage, *zoos):
        assert loader(source) == (ours, "load_from_local")
        with pytest.raises(ValueError, match=f"{source}.*copy the file.*hf-hub:owner/name"):
            CheckpointLoader.load_checkpoint(source)
    # None is left that mmengine would read in its own way.
    assert {found.__module__ for found in CheckpointLoader._schemes.values()} == {ours}


def test_remote_sources_are_read_alike(
    hostile: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file on the hub and one at a URL, both fetched before; the network is out of reach."""
    path, mark = hostile
    weights = dict(Toy().state_dict())
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(weights, snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = CheckpointLoader.load_checkpoint("hf-hub:owner/name")
    assert same(found["state_dict"], weights)

    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, to, *a, **k: Path(to).write_bytes(path.read_bytes())
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(ValueError, match=r"https://nowhere\.invalid/hostile\.pth.*refused"):
        CheckpointLoader.load_checkpoint("https://nowhere.invalid/hostile.pth")
    assert not mark.exists()


@pytest.mark.parametrize("resume", [False, True], ids=["load_from", "resume"])
def test_a_runner_does_not_run_a_hostile_checkpoint(hostile: tuple[Path, Path], resume: bool, tmp_path: Path) -> None:
    path, mark = hostile
    runner = toy_runner(tmp_path / "work", load_from=str(path), resume=resume)
    with pytest.raises(ValueError, match=r"hostile\.pth.*refused.*pathlib.*could run code"):
        runner.train()
    assert not mark.exists()


def test_a_runner_does_not_run_a_config_in_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    """A Python file as a string, in the place where mmcv's runner had it: mmengine reads it when it resumes."""
    mark, path = tmp_path / "mark", tmp_path / "hostile.pth"
    checkpoint = torch.load(trained / "epoch_1.pth", weights_only=False)
    checkpoint["meta"]["config"] = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    torch.save(checkpoint, path)
    toy_runner(tmp_path / "work", load_from=str(path), resume=True).train()
    assert not mark.exists()
    Config.fromstring(checkpoint["meta"]["config"], ".py")
    assert mark.exists()  # it would have been


class Record:
    """A dict's place taken by a record of NumPy, whose fields are read alike."""

    def __init__(self, **fields: Any) -> None:
        self.kinds = [(name, "U400" if isinstance(value, str) else "i8") for name, value in fields.items()]
        self.data = np.array([tuple(fields.values())], self.kinds).tobytes()

    def __reduce__(self) -> tuple[Any, ...]:
        return np.float64(0).__reduce__()[0], (Kind(self.kinds), self.data)


class Kind:
    """A structured dtype that is made by a call, as none is by pickling one."""

    def __init__(self, kinds: list[tuple[str, str]]) -> None:
        self.kinds = kinds

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, (self.kinds,)


@pytest.mark.parametrize("how", ["meta with its own pop", "file with its own get", "meta is a record"])
def test_a_config_in_a_checkpoint_does_not_hide(how: str, trained: Path, tmp_path: Path) -> None:
    """What an object in a checkpoint says of itself does not keep the config in it."""
    mark, path = tmp_path / "mark", tmp_path / "hostile.pth"
    config = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    checkpoint = OrderedDict(torch.load(trained / "epoch_1.pth", weights_only=False))
    meta = OrderedDict(checkpoint["meta"], config=config)
    checkpoint["meta"] = meta
    if how == "meta with its own pop":
        meta.__dict__["pop"] = slice
    elif how == "file with its own get":
        checkpoint.__dict__["get"] = slice
    else:
        checkpoint["meta"] = Record(config=config, epoch=0, iter=0, config_is_a_name="config")
    torch.save(checkpoint, path)
    runner = toy_runner(tmp_path / "work", load_from=str(path), resume=True)
    if how == "meta is a record":
        with pytest.raises(ValueError, match=r"hostile\.pth' has one void as 'meta', which is a dict"):
            runner.train()
    else:
        runner.train()
        assert "config" not in read_model_checkpoint(path)["meta"]
    assert not mark.exists()


def test_a_history_changes_no_other(tmp_path: Path) -> None:
    """A loss history brings numbers along, and neither methods of the class nor attributes."""

    class Hostile:
        def __init__(self, **state: Any) -> None:
            self.state = state

        def __reduce__(self) -> tuple[Any, ...]:
            return HistoryBuffer, (), self.state

    numbers = dict(_log_history=np.array([1.0, 3.0]), _count_history=np.array([1, 1]), max_length=10)
    hostile = Hostile(**numbers, statistics_methods={"mean": HistoryBuffer.max}, max=HistoryBuffer.min)
    torch.save({"state_dict": Toy().state_dict(), "history": hostile}, tmp_path / "w.pth")
    found = read_model_checkpoint(tmp_path / "w.pth")["history"]
    for history in (HistoryBuffer([1.0, 3.0], [1, 1]), found):
        assert type(history) is HistoryBuffer and history.statistics("mean") == 2.0 and history.max() == 3.0
    assert "max" not in vars(found)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"state_dict": None}, "has one NoneType as 'state_dict'"),
        ({"state_dict": {1: torch.zeros(2)}}, "has weights under what is no name: 1$"),
        ({"state_dict": {"a": torch.zeros(2)}, "meta": None}, "has one NoneType as 'meta'"),
    ],
)
def test_a_file_that_a_runner_cannot_use_is_refused_by_name(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"^checkpoint '\S+odd\.pth' {says}"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "odd.pth"))


@pytest.mark.parametrize("wrap", ["model", "state_dict in state_dict"])
def test_where_a_runner_would_find_no_weights(wrap: str, tmp_path: Path) -> None:
    """What a model is used with has its weights where mmengine's runner looks: it would load none, and say little."""
    weights = Toy().state_dict()
    content = {"model": weights} if wrap == "model" else {"state_dict": {"model": weights}}
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"^checkpoint '\S+odd\.pth' should have .* under 'state_dict'.* has model\."):
        read_weights(Toy(), tmp_path / "odd.pth")
    torch.save({"state_dict": weights}, tmp_path / "odd.pth")
    assert same(read_weights(Toy(), tmp_path / "odd.pth"), dict(weights))


@pytest.mark.parametrize("prefix", [None, "layer."])
def test_an_init_cfg_does_not_run_one(hostile: tuple[Path, Path], prefix: str | None) -> None:
    path, mark = hostile
    module = BaseModule(init_cfg=dict(type="Pretrained", checkpoint=str(path), prefix=prefix))
    with pytest.raises(ValueError, match=r"hostile\.pth.*refused"):
        module.init_weights()
    assert not mark.exists()


def test_load_checkpoint_does_not_run_one(hostile: tuple[Path, Path]) -> None:
    path, mark = hostile
    with pytest.raises(ValueError, match=r"hostile\.pth.*refused"):
        load_checkpoint(Toy(), str(path))
    assert not mark.exists()


def test_pretrained_weights_are_not_run(hostile: tuple[Path, Path], make_backbone: MakeBackbone) -> None:
    path, mark = hostile
    backbone = make_backbone(small=dict(pretrained=str(path)))
    with pytest.raises(ValueError, match=r"hostile\.pth.*refused"):
        backbone.init_weights()
    assert not mark.exists()


@pytest.mark.parametrize(
    ("owner", "name"), [(HistoryBuffer, "__init__"), (HistoryBuffer, "__subclasses__"), (OrderedDict, "fromkeys")]
)
def test_getattr_reaches_the_history_s_own_methods_alone(owner: Any, name: str, tmp_path: Path) -> None:
    def written(attribute: Gets) -> Path:
        torch.save({"state_dict": Toy().state_dict(), "meta": {"it": attribute}}, tmp_path / "gets.pth")
        return tmp_path / "gets.pth"

    assert read_model_checkpoint(written(Gets(HistoryBuffer, "mean")))["meta"]["it"] is HistoryBuffer.mean
    with pytest.raises(ValueError, match=r"gets\.pth.*refused.*getattr"):
        read_model_checkpoint(written(Gets(owner, name)))


def changed(weights: dict[str, Any], how: str) -> tuple[dict[str, Any], str]:
    """Weights of a backbone with one thing wrong, and what has to be said of it."""
    name = "network.anchors.1.model.blocks.2.mlp.fc1.bias"
    weights = dict(weights)
    tensor = weights.pop(name)
    if how == "missing":
        return weights, rf"missing: {name} \(192,\)$"
    if how == "renamed":
        return {**weights, name + "es": tensor}, rf"missing: {name} \(192,\); left over: {name}es \(192,\)$"
    if how == "shape":
        return {**weights, name: tensor[1:]}, rf"of another shape: {name} \(191,\) instead of \(192,\)$"
    return {**weights, name: tensor, "more": torch.zeros(2, 3)}, r"left over: more \(2, 3\)$"


@pytest.mark.parametrize("how", ["missing", "renamed", "shape", "more"])
@pytest.mark.parametrize("wrap", [False, True])
def test_what_does_not_fit_is_listed(how: str, wrap: bool, make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    weights, says = changed(backbone.state_dict(), how)
    with pytest.raises(ValueError, match=rf"^checkpoint 'a\.pth' .*{says}"):
        check_weights(backbone, {"state_dict": weights} if wrap else weights, "a.pth")


def test_long_lists_are_cut(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    count = len(backbone.state_dict()) - 3  # without draws and the grids of two anchors
    with pytest.raises(ValueError) as raised:
        check_weights(backbone, {"a": torch.zeros(1)}, "a.pth")
    missing, left_over = str(raised.value).split("missing: ")[1].split("; left over: ")
    assert missing.endswith(f" and {count - 20} more") and missing.count("network.") == 20
    assert left_over == "a (1,)"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_model_with_nan_is_not_evaluated(value: float, make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """In one line that names the file and the tensor. Infinity that the model itself has, in a mask, is no fault."""
    backbone = make_backbone()
    name = "network.anchors.1.model.blocks.2.mlp.fc1.bias"
    weights = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    weights[name][7] = value
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    with pytest.raises(DataError, match=rf"a\.pth' has NaN or infinity in {name}\. The run") as raised:
        read_weights(backbone, tmp_path / "a.pth")
    assert "\n" not in str(raised.value)
    backbone.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    check_weights(backbone, backbone.state_dict(), "a.pth")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_fits(prefix: str, draws: bool, wrapped: bool, make_backbone: MakeBackbone) -> None:
    """As mmengine would load it: with what DistributedDataParallel puts before names, with and without the draws."""
    backbone = make_backbone()
    weights = {prefix + name: tensor for name, tensor in backbone.state_dict().items() if draws or name != "draws"}
    model = nn.DataParallel(backbone) if wrapped else backbone
    check_weights(model, {"state_dict": weights}, "a.pth")
    assert set(model_weights({"state_dict": weights}, "a.pth")) | {"draws"} == set(backbone.state_dict())


def test_mmengine_says_which_loader_reads(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("test_checkpoint")
    with caplog.at_level(logging.INFO, "test_checkpoint"):
        CheckpointLoader.load_checkpoint(str(trained / "epoch_1.pth"), logger=log)
    assert re.search(r"by local backend from path: .*epoch_1\.pth", caplog.text)


def other_size(make_backbone: MakeBackbone) -> tuple[StitchedBackbone, StitchedBackbone]:
    """Two backbones with position biases, for 4 x 2 patches and for 2 x 4."""
    bias = dict(rel_pos_bias=True)
    one, other = (make_backbone(small=bias, large=bias, img_size=size) for size in ((64, 32), (32, 64)))
    return one, other


def is_resampled(found: StitchedBackbone, source: StitchedBackbone) -> None:
    for own, other in zip(found.network.anchors, source.network.anchors, strict=True):
        expected = resample_abs_pos_embed(other.model.pos_embed, [2, 4], [4, 2], num_prefix_tokens=1)
        torch.testing.assert_close(own.model.pos_embed.data, expected.data)
        for block, theirs in zip(own.model.blocks, other.model.blocks, strict=True):
            expected = resize_table(theirs.attn.relative_position_bias_table, (4, 2), (2, 4))
            torch.testing.assert_close(block.attn.relative_position_bias_table.data, expected.data)


@pytest.mark.parametrize("way", ["load_checkpoint", "init_cfg", "strict"])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_checkpoint_of_another_image_size(
    way: str, parallel: bool, make_backbone: MakeBackbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resampled and said, whatever loads it; with the names of mmengine's own state dict, as the runner saves them."""
    source, backbone = other_size(make_backbone)
    weights = get_state_dict(source)
    assert weights["network.anchors.0.grid"].tolist() == [4, 2]
    path, at = tmp_path / "w.pth", "module." if parallel else ""
    torch.save({"state_dict": {f"{at}{key}": value for key, value in weights.items()}, "meta": {}}, path)
    if way == "load_checkpoint":
        load_checkpoint(backbone, str(path), strict=True)
    elif way == "init_cfg":
        backbone.init_cfg = dict(type="Pretrained", checkpoint=str(path))
        backbone.init_weights()
    else:
        backbone.load_state_dict(read_weights(backbone, path), strict=True)
    is_resampled(backbone, source)
    said = [record.getMessage() for record in caplog.records if record.name == "mmsnnet"]
    assert [text.split(":")[0] for text in said] == ["network.anchors.0", "network.anchors.1"]


def test_another_size_fits_where_the_grid_is_recorded(make_backbone: MakeBackbone) -> None:
    source, backbone = other_size(make_backbone)
    check_weights(backbone, source.state_dict(), "w.pth")
    square = make_backbone(img_size=64, small=dict(rel_pos_bias=True), large=dict(rel_pos_bias=True))
    weights = source.state_dict()
    check_weights(square, weights, "w.pth")
    del weights["network.anchors.1.grid"]
    with pytest.raises(ValueError, match=r"of another shape: network\.anchors\.1\.model\.pos_embed") as caught:
        check_weights(square, weights, "w.pth")
    assert "anchors.0" not in str(caught.value) and "missing" not in str(caught.value)
    # No other tensor may be of another size.
    weights = source.state_dict()
    weights["network.anchors.1.model.cls_token"] = torch.zeros(1, 1, 7)
    with pytest.raises(ValueError, match=r"of another shape: network\.anchors\.1\.model\.cls_token \(1, 1, 7\)"):
        check_weights(square, weights, "w.pth")
    # Nor is a grid let pass that the tensors contradict, or that is none.
    with pytest.raises(ValueError, match=r"another shape: network\.anchors\.0\.model\.pos_embed"):
        check_weights(square, source.state_dict() | {"network.anchors.0.grid": torch.tensor([3, 3])}, "w.pth")
    with pytest.raises(ValueError, match=r"left over: network\.anchors\.0\.grid \(1,\)"):
        check_weights(backbone, source.state_dict() | {"network.anchors.0.grid": torch.tensor([3])}, "w.pth")


def test_averaged_weights_are_of_a_grid_too(make_backbone: MakeBackbone) -> None:
    source, backbone = other_size(make_backbone)
    averages = [ExponentialMovingAverage(model, update_buffers=True) for model in (source, backbone)]
    averages[0].update_parameters(source)
    averages[1].load_state_dict(averages[0].state_dict(), strict=True)
    is_resampled(averages[1].module, source)


@pytest.mark.parametrize("kind", ["safetensors", "converted", "no meta", "published", "of mmcv", "no epoch"])
def test_what_is_resumed_has_more_than_weights(kind: str, trained: Path, tmp_path: Path) -> None:
    path, weights = tmp_path / "weights.pth", Toy().state_dict()
    of_run = torch.load(trained / "epoch_1.pth", weights_only=False)
    of_run["meta"].pop("dataset_meta", None)
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(weights, path)
    elif kind == "converted":
        torch.save({"state_dict": weights, "meta": {"mmsnnet_version": "1", "dataset_meta": {"classes": ["a"]}}}, path)
    elif kind == "no meta":
        torch.save({"state_dict": weights}, path)
    elif kind == "published":  # by mmengine's hook, with these two of its published_keys
        torch.save({key: of_run[key] for key in ("meta", "state_dict")}, path)
    elif kind == "of mmcv":
        torch.save({"state_dict": weights, "meta": {"epoch": 1, "iter": 2}, "optimizer": of_run["optimizer"]}, path)
    else:
        del of_run["meta"]["epoch"]
        torch.save(of_run, path)
    runner = toy_runner(tmp_path / "work", load_from=str(path), resume=True)
    with pytest.raises(ValueError, match=rf"{path.name}' has weights alone.* leave out --resume, or load_from"):
        runner.train()
    meta = read_model_checkpoint(path)["meta"]
    assert meta.get("mmsnnet_version") == ("1" if kind == "converted" else None) and "epoch" not in meta
    with pytest.raises(KeyError, match="'CLASSES'"):
        meta["CLASSES"]
