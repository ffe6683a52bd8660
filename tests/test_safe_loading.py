"""With safe loading mmengine reads checkpoints without running what is in them."""

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
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader, load_checkpoint

import mmsnnet.safe_loading
from mmsnnet.models import StitchedBackbone, read_model_checkpoint
from tests.conftest import RunsCode
from tests.models.toy_run import Toy, same, toy_runner

MakeBackbone = Callable[..., StitchedBackbone]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run, with a checkpoint of each epoch."""
    folder = tmp_path_factory.mktemp("trained")
    with torch.random.fork_rng(devices=[]):
        toy_runner(folder).train()
    return folder


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of the toy model with code in it, and the mark that the code would leave."""
    mark, path = tmp_path / "mark", tmp_path / "hostile.pth"
    torch.save({"state_dict": Toy().state_dict(), "meta": RunsCode(mark)}, path)
    torch.load(path, weights_only=False)
    assert mark.exists(), "the code does not run even where it may"
    mark.unlink()
    return path, mark


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

    ours = mmsnnet.safe_loading.__name__
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
        with pytest.raises(ValueError, match=r"hostile\.pth' has a void as 'meta'; it should be a dict"):
            runner.train()
    else:
        runner.train()
        assert "config" not in read_model_checkpoint(path)["meta"]
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"state_dict": None}, "has a NoneType as 'state_dict'"),
        ({"state_dict": {1: torch.zeros(2)}}, "should have weights by name, got keys that are not strings: 1$"),
        ({"state_dict": {"a": torch.zeros(2)}, "meta": None}, "has a NoneType as 'meta'"),
    ],
)
def test_a_file_that_a_runner_cannot_use_is_refused_by_name(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"^checkpoint '\S+odd\.pth' {says}"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "odd.pth"))


@pytest.mark.parametrize("prefix", [None, "backbone."])
@pytest.mark.parametrize("name", ["cls_token", "blocks.0.attn.qkv.weight", "blocks.0.norm1.bias"])
def test_an_init_cfg_loads_no_integers_as_weights(
    name: str, prefix: str | None, make_backbone: MakeBackbone, tmp_path: Path
) -> None:
    weights = {f"{prefix or ''}{key}": value for key, value in make_backbone().state_dict().items()}
    key = f"{prefix or ''}network.anchors.1.model.{name}"
    torch.save(weights | {key: weights[key].to(torch.int8)}, tmp_path / "w.pth")
    backbone = make_backbone(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth"), prefix=prefix))
    with pytest.raises(ValueError, match=rf"of another kind: {key} int8 in place of float32"):
        backbone.init_weights()


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


def test_mmengine_says_which_loader_reads(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("test_checkpoint")
    with caplog.at_level(logging.INFO, "test_checkpoint"):
        CheckpointLoader.load_checkpoint(str(trained / "epoch_1.pth"), logger=log)
    assert re.search(r"by local backend from path: .*epoch_1\.pth", caplog.text)
