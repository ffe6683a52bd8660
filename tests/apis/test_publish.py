"""Published models: files, loading, and refused input."""

import json
import os
import re
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mmsnnet import __version__
from mmsnnet.apis import build_model, build_space, extract_stitch, load_config, publish_model
from mmsnnet.apis.overlay import overlay_of
from mmsnnet.apis.publish import Published, published_config
from mmsnnet.evaluation import OperatingPoint, OperatingPoints, select_stitch
from mmsnnet.registry import MODELS
from mmsnnet.stitching import create_anchor, load_pretrained
from tests.conftest import RunsCode

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs/quickstart"
STITCHED, SINGLE = CONFIGS / "stitched-vit-s-l_setr_shapes-64x64.py", CONFIGS / "vit-s_setr_shapes-64x64.py"


def as_trained(path: Path, config: Config) -> BaseModel:
    """A model with random weights. Writes its checkpoint with an optimizer state of AdamW's size."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
    moments = {index: dict(exp_avg=p, exp_avg_sq=p) for index, p in enumerate(model.state_dict().values())}
    rest = {"optimizer": {"state": moments, "param_groups": []}, "message_hub": {}, "meta": {"iter": 8}}
    torch.save({"state_dict": model.state_dict(), **rest}, path)
    return model


@pytest.fixture
def config() -> Config:
    return load_config(STITCHED)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "iter_8.pth"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> BaseModel:
    """The model of the checkpoint."""
    with torch.random.fork_rng(devices=[]):
        return as_trained(checkpoint, load_config(STITCHED))


@pytest.fixture(scope="module")
def published(checkpoint: Path, model: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Published:
    out = tmp_path_factory.mktemp("published") / "new" / "snnet"
    return publish_model(load_config(STITCHED), checkpoint, out)


@pytest.fixture
def folder(published: Published) -> Path:
    """The published folder of the checkpoint."""
    return published.weights.parent


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a if not name.endswith("draws"))


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (
            dict(type="PascalVOCDataset", ann_file="nowhere.txt"),
            ("background", "aeroplane"),
        ),  # asserts that files exist
        (dict(type="BaseSegDataset", metainfo=dict(classes=["one", "two"])), ("one", "two")),
    ],
)
def test_a_folder_has_a_colour_for_every_class_without_the_data(
    config: Config, checkpoint: Path, model: BaseModel, dataset: dict, names: tuple[str, ...], tmp_path: Path
) -> None:
    pipeline = config.test_dataloader.dataset.pipeline
    config.test_dataloader.dataset = dict(dataset, pipeline=pipeline, data_root="nowhere")
    publish_model(config, checkpoint, tmp_path / "out")
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    assert tuple(classes["classes"][:2]) == names
    assert np.shape(classes["palette"]) == (len(classes["classes"]), 3)
    overlay = overlay_of(load_config(tmp_path / "out/config.py"), "segmentation")
    assert (
        list(overlay.classes) == classes["classes"] and [list(color) for color in overlay.palette] == classes["palette"]
    )


@pytest.mark.slow
def test_the_folder_has_weights_config_and_card(
    published: Published, folder: Path, checkpoint: Path, model: BaseModel
) -> None:
    assert sorted(os.listdir(folder)) == ["README.md", "classes.json", "config.py", "model.safetensors"]
    assert os.listdir(folder.parent) == ["snnet"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read one may read all
    data = (folder / "model.safetensors").read_bytes()
    assert (published.weights, published.size) == (folder / "model.safetensors", len(data))
    assert published.sha256 == sha256(data).hexdigest()
    # As the format has it: eight bytes with the length of a header, the header, and the tensors without gaps.
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "backbone.draws"}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert len(data) == 8 + struct.unpack("<Q", data[:8])[0] + size < checkpoint.stat().st_size
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    card = (folder / "README.md").read_text()
    assert "# snnet\n" in card and "32 stitches" in card
    assert "`vit_tiny_patch16_224` (6 blocks, width 32), `vit_tiny_patch16_224` (12 blocks, width 128)" in card


def test_the_card_s_code_loads_the_model(folder: Path, model: BaseModel) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), names)
    assert same_weights(names["model"], model) and names["model"].backbone.stitch.name == "L"


@pytest.mark.parametrize("source", ["", "model.safetensors"])
def test_the_model_is_built_from_the_folder_alone(
    source: str, config: Config, folder: Path, model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a working folder without the config's bases and the anchors' files."""
    monkeypatch.chdir(tmp_path)
    published = load_config(folder / "config.py")
    assert same_weights(build_model(published, folder / source), model)
    assert [anchor.pretrained for anchor in published.model.backbone.anchors] == [None, None]
    assert {"work_dir", "load_from", "resume"} & set(published) == set()
    # All else is as it was.
    for name in ("train_dataloader", "optim_wrapper", "train_cfg", "custom_hooks", "custom_imports", "default_scope"):
        assert published[name] == config[name]
    assert published.model.decode_head == config.model.decode_head
    MODELS.build(published.model).init_weights()


def test_a_published_model_is_published_again(published: Published, folder: Path, tmp_path: Path) -> None:
    again = publish_model(load_config(folder / "config.py"), folder, tmp_path / "again")
    # The files differ in the order of their metadata alone, which safetensors does not keep.
    one, other = (safetensors.torch.load_file(out.weights) for out in (published, again))
    assert again.size == published.size and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "again" / "config.py").read_text() == (folder / "config.py").read_text()


def test_a_published_anchor_is_a_source_for_pretrained(tmp_path: Path) -> None:
    config = load_config(SINGLE)
    trained = as_trained(tmp_path / "anchor.pth", config)
    publish_model(config, tmp_path / "anchor.pth", tmp_path / "out")
    assert "in one stitch" in (tmp_path / "out" / "README.md").read_text()
    anchor = create_anchor("vit_tiny_patch16_224", 64, patch_size=8, embed_dim=32, depth=6, num_heads=2)
    load_pretrained(anchor, str(tmp_path / "out"))
    expected = trained.backbone.network.anchor(0).model.state_dict()
    result: dict[str, Tensor] = anchor.model.state_dict()
    assert result.keys() == expected.keys() and all(torch.equal(result[name], expected[name]) for name in result)


@pytest.mark.slow
def test_a_checkpoint_of_another_image_size(config: Config, checkpoint: Path, model: BaseModel, tmp_path: Path) -> None:
    """It is published unchanged, with the grid to resample it from; an extracted stitch is resampled."""
    other = load_config(STITCHED, {"model.backbone.img_size": (48, 80)})
    publish_model(other, checkpoint, tmp_path / "out")
    published = build_model(load_config(tmp_path / "out" / "config.py"), tmp_path / "out")
    extract_stitch(other, checkpoint, "L", tmp_path / "stitch")
    extracted = build_model(load_config(tmp_path / "stitch" / "config.py"), tmp_path / "stitch")
    for result in (published, extracted):
        positions = model.backbone.network.anchor(-1).model.pos_embed
        expected = resample_abs_pos_embed(positions, [6, 10], [8, 8], num_prefix_tokens=positions.shape[1] - 64)
        torch.testing.assert_close(result.backbone.network.anchor(-1).model.pos_embed, expected)
    grids = {name for name in extracted.state_dict() if name.endswith(".grid")}
    assert grids == {"backbone.network.anchors.1.grid"}


def test_all_sources_of_weights_are_left_out() -> None:
    source = dict(type="Pretrained", checkpoint="a.pth")
    model = dict(
        pretrained="a.pth",
        init_cfg=source,
        backbone=dict(
            anchors=[dict(model="x", pretrained=True), dict(model="y")], init_cfg=[dict(type="Normal"), source]
        ),
        decode_head=dict(type="Head", init_cfg=dict(type="Normal")),
    )
    config = Config(dict(model=model, work_dir="w", load_from="a.pth", resume=True, launcher="pytorch", data_root="d"))
    result = published_config(config)
    assert result.model == dict(
        pretrained=None,
        init_cfg=None,
        backbone=dict(anchors=[dict(model="x", pretrained=None), dict(model="y")], init_cfg=[dict(type="Normal")]),
        decode_head=dict(type="Head", init_cfg=dict(type="Normal")),
    )
    assert set(result) == {"model", "data_root", "custom_imports"} and result.custom_imports.imports == [
        "mmsnnet.safe_loading"
    ]
    assert config.load_from == "a.pth" and config.model.pretrained == "a.pth"


def test_tensors_that_share_memory_are_copied(config: Config, model: BaseModel, tmp_path: Path) -> None:
    """RTMDet's levels share layers."""
    weights = dict(model.state_dict())
    weights["decode_head.conv_seg.bias"] = weights["decode_head.conv_seg.weight"].flatten()[:8]
    torch.save({"state_dict": weights}, tmp_path / "shared.pth")
    publish_model(config, tmp_path / "shared.pth", tmp_path / "out")
    loaded = build_model(config, tmp_path / "out").state_dict()
    assert torch.equal(loaded["decode_head.conv_seg.bias"], weights["decode_head.conv_seg.bias"])


@pytest.mark.parametrize("there", ["a folder with a file", "a file"])
def test_nothing_is_overwritten(there: str, config: Config, checkpoint: Path, model: BaseModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "file").write_text("mine")
    with pytest.raises(ValueError, match=rf"{out} exists"):
        publish_model(config, checkpoint, out)
    assert (out if out.is_file() else out / "file").read_text() == "mine"


def test_an_empty_folder_is_filled(config: Config, checkpoint: Path, model: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish_model(config, checkpoint, tmp_path / "out")
    assert same_weights(build_model(config, tmp_path / "out"), model)


@pytest.mark.slow
def test_the_same_model_has_the_same_digest(config: Config, checkpoint: Path, model: BaseModel, tmp_path: Path) -> None:
    digests = {publish_model(config, checkpoint, tmp_path / name).sha256 for name in "abc"}
    assert len(digests) == 1
    assert f"mmsnnet {__version__}" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize(
    ("imports", "wanted"),
    [
        ("numpy", ["mmsnnet.safe_loading", "numpy"]),
        ("mmsnnet.safe_loading", ["mmsnnet.safe_loading"]),
        (["numpy", "mmsnnet.safe_loading"], ["numpy", "mmsnnet.safe_loading"]),
    ],
)
def test_imports_may_be_one_name(imports: str | list[str], wanted: list[str]) -> None:
    published = published_config(Config(dict(model=dict(type="ToyModel"), custom_imports=dict(imports=imports))))
    assert published.custom_imports.imports == wanted


@pytest.mark.parametrize("wrong", ["missing", "renamed", "shape", "hostile", "nowhere", "other config"])
def test_refused_input_leaves_no_folder(
    wrong: str, config: Config, checkpoint: Path, model: BaseModel, tmp_path: Path
) -> None:
    name, mark = "decode_head.conv_seg.bias", tmp_path / "mark"
    content = torch.load(checkpoint)
    weights = content["state_dict"]
    says, error = "", ValueError
    if wrong == "missing":
        del weights[name]
        says = rf"missing: {name} \(8,\)$"
    elif wrong == "renamed":
        weights["decode_head.bias"] = weights.pop(name)
        says = rf"missing: {name} \(8,\); left over: decode_head\.bias \(8,\)$"
    elif wrong == "shape":
        weights[name] = weights[name][:7]
        says = rf"of another shape: {name} \(7,\) instead of \(8,\)$"
    elif wrong == "hostile":
        content["meta"] = RunsCode(mark)
        says = "refused.*pathlib.*could run code"
    elif wrong == "nowhere":
        checkpoint, says, error = tmp_path / "nowhere.pth", "nowhere", FileNotFoundError
    else:
        config, says = load_config(SINGLE), r"left over: .* and \d+ more"
    if wrong != "nowhere":
        checkpoint = tmp_path / "wrong.pth"
        torch.save(content, checkpoint)
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=says):
        publish_model(config, checkpoint, tmp_path / "out")
    if error is ValueError:
        with pytest.raises(ValueError, match=says):
            build_model(config, checkpoint)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_failure_half_way_leaves_no_folder(
    config: Config, checkpoint: Path, model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Config, "dump", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="no space left"):
        publish_model(config, checkpoint, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def measured(path: Path, names: dict[int, str]) -> Path:
    """Write points of some stitches to ``path``: better ones cost more, and one is not on the front."""
    points = [
        OperatingPoint(id_, name, "LSL", (n + 1) * 10**8, 1, {"mIoU": 40.0 + n, "aAcc": 80.0})
        for n, (id_, name) in enumerate(names.items())
    ]
    points.append(OperatingPoint(1, "L", "L", 10**9, 1, {"mIoU": 30.0, "aAcc": 80.0}))
    OperatingPoints("a.py", "a.pth", "shapes", (64, 64), "cpu", tuple(points), {"config": "1f"}).save(path)
    return path


@pytest.fixture
def some(config: Config) -> dict[int, str]:
    """Stitches of the model, by id."""
    return {stitch.id: stitch.name for stitch in build_space(config).stitches[2:7]}


@pytest.mark.slow
def test_the_front_is_published_with_the_model(
    config: Config, checkpoint: Path, model: BaseModel, some: dict[int, str], tmp_path: Path
) -> None:
    path = measured(tmp_path / "points.json", some)
    out = tmp_path / "out"
    publish_model(config, checkpoint, out, path)
    assert sorted(os.listdir(out)) == ["README.md", "classes.json", "config.py", "front.json", "model.safetensors"]
    front = OperatingPoints.load(out / "front.json")
    assert {point.id: point.metrics for point in front} == {id_: {"mIoU": 40.0 + n} for n, id_ in enumerate(some)}
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(out)), names)
    # The card takes the third of the five stitches for an example.
    assert names["model"].backbone.stitch.id == list(some)[2]
    assert names["model"].backbone.set_budget(max_gflops=0.45).id == select_stitch(path, max_gflops=0.45).id


@pytest.mark.slow
def test_the_config_has_the_points_of_a_budget(
    checkpoint: Path, model: BaseModel, some: dict[int, str], tmp_path: Path
) -> None:
    path = measured(tmp_path / "points.json", some)
    budget = {"model.backbone.budget": dict(points=str(path), max_gflops=0.35)}
    config = load_config(STITCHED, budget)
    publish_model(config, checkpoint, tmp_path / "out")
    path.unlink()
    backbone = build_model(load_config(tmp_path / "out" / "config.py"), tmp_path / "out").backbone
    assert backbone.stitch.id == list(some)[2]
    assert backbone.set_budget(max_gflops=0.15).id == next(iter(some))
    assert config.model.backbone.budget.points == str(path)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["another space", "cut short", "nowhere"])
def test_points_that_are_refused_leave_nothing(
    wrong: str, config: Config, checkpoint: Path, model: BaseModel, some: dict[int, str], tmp_path: Path
) -> None:
    path = measured(tmp_path / "points.json", {id_: f"{name}-L99" for id_, name in some.items()})
    error, message = ValueError, "of another stitch space"
    if wrong == "cut short":
        path.write_bytes(path.read_bytes()[:-20])
        message = "found no valid JSON"
    elif wrong == "nowhere":
        path.unlink()
        error, message = FileNotFoundError, "no such file"
    with pytest.raises(error, match=message):
        publish_model(config, checkpoint, tmp_path / "out", path)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"points.json"}
