"""Stitches extracted from a trained model: files, outputs, costs, and refused input."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from mmsnnet.apis import build_model, build_uninitialized, extract_stitch, load_config
from mmsnnet.apis.extract import extracted_config
from mmsnnet.apis.model import build_without_weights
from mmsnnet.datasets import write_shapes
from mmsnnet.engine.recalibration import recalibrate_on_training_images
from mmsnnet.errors import SettingError
from mmsnnet.models import model_costs
from mmsnnet.registry import MODELS
from mmsnnet.stitching import UnknownStitchError, create_anchor, load_pretrained

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "configs/quickstart"
STITCHED, SINGLE = QUICKSTART / "stitched-vit-s-l_setr_shapes-64x64.py", QUICKSTART / "vit-s_setr_shapes-64x64.py"
THREE = QUICKSTART / "stitched-vit-s-m-l_setr_shapes-64x64.py"
CLASSIFIER = REPOSITORY / "configs/imagenet/stitched-vit-s-l_4e_cifar10-32x32.py"
DETECTOR = REPOSITORY / "configs/coco/stitched-vit-s-l_mask-rcnn_300_coco128-256x256.py"


class Trained:
    """A model of a config with random weights, and its checkpoint."""

    def __init__(self, path: Path, config: Path, **options: Any) -> None:
        self.path, self.config = path / "iter_8.pth", load_config(config, options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = build_model(self.config)
            for name, tensor in self.model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor), alpha=0.05)
                if name.endswith("running_var"):
                    tensor.abs_()
        torch.save({"state_dict": self.model.state_dict(), "optimizer": {}, "meta": {"iter": 8}}, self.path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Trained]:
    """``trained(config)``: the trained model of a config, the same for all tests."""
    made: dict[Path, Trained] = {}

    def make(config: Path) -> Trained:
        if config not in made:
            made[config] = Trained(tmp_path_factory.mktemp("trained"), config)
        load_config(config)  # what is built by name is looked up in the toolbox of the config loaded last
        return made[config]

    return make


@pytest.fixture(scope="module")
def folder(trained: Callable[[Path], Trained], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """S2-L6, extracted from a segmentor."""
    whole, out = trained(STITCHED), tmp_path_factory.mktemp("extracted") / "one"
    extract_stitch(whole.config, whole.path, "S2-L6", out)
    return out


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def maps(model: BaseModel, images: Tensor) -> list[Tensor]:
    """The maps of the backbone, and the logits if the model gives some for images alone."""
    with torch.no_grad():
        result = model.backbone(images)
        logits = [] if hasattr(model, "roi_head") else [model(images, mode="tensor")]
    return [result, *logits] if isinstance(result, Tensor) else [*(tap for tap in result if tap is not None), *logits]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "stitches"),
    [
        (STITCHED, ["S", 4, "L3-S2-L6"]),
        (THREE, ["S", "L7-M5"]),
        (CLASSIFIER, ["S", "S3-L8-S5"]),
        (DETECTOR, ["L3-S2-L6"]),
    ],
    ids=["taps", "three anchors", "classifier", "windows and two stages"],
)
def test_an_extracted_stitch_has_the_same_outputs_and_costs(
    config: Path, stitches: list[int | str], trained: Callable[[Path], Trained], tmp_path: Path
) -> None:
    whole = trained(config)
    costs = model_costs(whole.model)
    for key in stitches:
        out = tmp_path / str(key)
        extracted = extract_stitch(whole.config, whole.path, key, out)
        assert sorted({*os.listdir(out), "classes.json"}) == [
            "README.md",
            "classes.json",
            "config.py",
            "model.safetensors",
        ]
        one = build_model(load_config(out / "config.py"), out)
        whole.model.backbone.set_stitch(key)
        stitch = whole.model.backbone.stitch
        assert one.backbone.space.stitches == (stitch,)
        images = torch.randn(2, 3, *whole.model.backbone.img_size)
        for result, expected in zip(maps(one, images), maps(whole.model, images), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert model_costs(one) == {stitch.id: costs[stitch.id]}
        # As small as the parameters say: four bytes each, beside the header, the statistics of batch norms and two
        # numbers for the grid of each anchor with positions.
        assert numel(one) == costs[stitch.id].params
        data = (out / "model.safetensors").read_bytes()
        persistent = set(one.state_dict())
        statistics = sum(b.numel() * b.element_size() for name, b in one.named_buffers() if name in persistent)
        grids = 16 * sum(name.endswith(".grid") for name in persistent)
        header = 8 + struct.unpack("<Q", data[:8])[0]
        assert extracted.size == len(data) == header + 4 * costs[stitch.id].params + statistics + grids


@pytest.mark.slow
def test_the_parameters_of_a_depth_estimator_at_full_size() -> None:
    """Only names and numbers: no forward of this size."""
    config = load_config(REPOSITORY / "configs/nyu/stitched-deit3-s-b_dpt_8xb2-24e_nyu-416x544.py")
    whole = build_uninitialized(config)
    costs = model_costs(whole)
    for name in ("S", "S0-L1-S3"):
        stitch = whole.backbone.space[name]
        one = build_without_weights(extracted_config(config, whole.backbone, stitch))
        assert numel(one) == costs[stitch.id].params
        assert set(one.state_dict()) < set(whole.state_dict())


@pytest.mark.slow
def test_outputs_without_low_rank_updates_are_equal_to_the_bit(tmp_path: Path) -> None:
    whole = Trained(tmp_path, STITCHED, **{"model.backbone.rank": 0})
    extract_stitch(whole.config, whole.path, "L3-S2-L6", tmp_path / "out")
    one = build_model(load_config(tmp_path / "out" / "config.py"), tmp_path / "out")
    whole.model.backbone.set_stitch("L3-S2-L6")
    images = torch.randn(2, 3, 64, 64)
    for result, expected in zip(maps(one, images), maps(whole.model, images), strict=True):
        assert torch.equal(result, expected)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", "shapes", 6, 2, (64, 64))


@pytest.mark.slow
def test_recalibrated_statistics_are_those_that_the_stitch_has_in_the_whole(shapes: Path, tmp_path: Path) -> None:
    """A plain ViT has no batch norm, but its head has, which other routes bring other maps."""
    whole = Trained(tmp_path, STITCHED, data_root=str(shapes), **{"model.backbone.rank": 0})
    stitch = whole.model.backbone.space["L3-S2-L6"]
    [expected] = recalibrate_on_training_images(whole.config, whole.model, [stitch], 5).values()
    extract_stitch(whole.config, whole.path, "L3-S2-L6", tmp_path / "plain")
    extract_stitch(whole.config, whole.path, "L3-S2-L6", tmp_path / "own", recalibrate=5)
    plain, own = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "own"))
    changed = {name: tensor for name, tensor in own.items() if not torch.equal(tensor, plain[name])}
    norms = {name: expected[norm] for name, norm in whole.model.named_modules() if norm in expected}
    assert norms and changed.keys() == {f"{name}.running_{part}" for name in norms for part in ("mean", "var")}
    for name, (mean, variance) in norms.items():
        assert torch.equal(own[f"{name}.running_mean"], mean) and torch.equal(own[f"{name}.running_var"], variance)


def test_without_batch_norms_there_is_nothing_to_recalibrate(
    trained: Callable[[Path], Trained], tmp_path: Path
) -> None:
    whole = trained(CLASSIFIER)
    with pytest.raises(SettingError, match="no BatchNorm, so there is nothing to recalibrate"):
        extract_stitch(whole.config, whole.path, "S", tmp_path / "out", recalibrate=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_slide_inference(trained: Callable[[Path], Trained], folder: Path) -> None:
    """mmseg's ``inference_model`` with the folder alone, on an image larger than a crop."""
    from mmseg.apis import inference_model, init_model

    slide = {"model.test_cfg": dict(mode="slide", crop_size=(64, 64), stride=(42, 42))}
    image = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    one = init_model(str(folder / "config.py"), str(folder), device="cpu", cfg_options=slide)
    whole = init_model(trained(STITCHED).config.copy(), str(trained(STITCHED).path), device="cpu", cfg_options=slide)
    whole.backbone.set_stitch("S2-L6")
    result, expected = inference_model(one, image), inference_model(whole, image)
    assert result.pred_sem_seg.data.shape == (1, 100, 120)
    torch.testing.assert_close(result.seg_logits.data, expected.seg_logits.data, rtol=1e-4, atol=1e-4)


def test_the_config_has_only_the_stitch(trained: Callable[[Path], Trained], folder: Path) -> None:
    whole, config = trained(STITCHED).config, load_config(folder / "config.py")
    backbone = config.model.backbone
    assert (backbone.only, backbone.rank) == ("S2-L6", 0)
    assert [anchor.pretrained for anchor in backbone.anchors] == [None, None]
    assert whole.model.auxiliary_head is not None and config.model.auxiliary_head is None
    assert config.val_cfg.stitches == "all"
    assert whole.val_cfg.stitches == "anchors" and "only" not in whole.model.backbone
    # Data, schedule and the other head are as they were.
    for name in ("train_dataloader", "test_dataloader", "optim_wrapper", "train_cfg", "custom_hooks", "default_scope"):
        assert config[name] == whole[name]
    assert config.model.decode_head == whole.model.decode_head
    card = (folder / "README.md").read_text()
    assert "in one stitch, 4 (S2-L6)." in card and "set_stitch" not in card


def test_settings_that_name_metrics_of_another_stitch() -> None:
    config = load_config(STITCHED)
    config.model.backbone.update(stitch="L", out_indices=dict(train=(3, 7, 11), test=(7, 11)))
    config.default_hooks.checkpoint.update(save_best=["L/mIoU", "mIoU"])
    config.custom_hooks.append(dict(type="EarlyStoppingHook", monitor="S/coco/bbox_mAP"))
    config.param_scheduler.append(dict(type="ReduceOnPlateauLR", monitor="coco/bbox_mAP"))
    config.test_cfg = dict(type="mmsnnet.StitchTestLoop", stitches="anchors")
    config.custom_hooks.append(dict(type="mmsnnet.NarrowDrawsHook", within=1.0))
    config.train_cfg.update(stitches_per_step=3, distill=dict(outputs=1.0))
    model = MODELS.build(config.model)
    result = extracted_config(config, model.backbone, model.backbone.space["S2-L6"])
    assert result.default_hooks.checkpoint.save_best == ["S2-L6/mIoU", "mIoU"]
    assert result.custom_hooks[-1].monitor == "S2-L6/coco/bbox_mAP"
    assert result.param_scheduler[-1].monitor == "coco/bbox_mAP"  # no stitch is named so
    assert result.test_cfg == dict(type="mmsnnet.StitchTestLoop", stitches="all")
    assert result.model.backbone.out_indices == (None, 7, 11)
    assert "stitch" not in result.model.backbone
    assert {"stitches_per_step", "distill"}.isdisjoint(result.train_cfg) and result.train_cfg.max_iters == 800
    budget = load_config(STITCHED)
    budget.model.backbone.budget = dict(points="front.json", max_gflops=1)
    assert "budget" not in extracted_config(budget, model.backbone, model.backbone.space["S"]).model.backbone


@pytest.mark.slow
def test_a_stitch_is_extracted_again_without_a_change(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder / "config.py")
    extract_stitch(config, folder, 4, tmp_path / "again")
    weights, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    with pytest.raises(UnknownStitchError, match=r"no stitch 'L' in this space of one: 4 \(S2-L6\)"):
        extract_stitch(config, folder, "L", tmp_path / "other")


@pytest.mark.slow
def test_an_extracted_anchor_is_a_source_for_pretrained(trained: Callable[[Path], Trained], tmp_path: Path) -> None:
    """An anchor that was trained in a stitched model can be used alone or in another pair."""
    whole = trained(CLASSIFIER)
    extract_stitch(whole.config, whole.path, "S", tmp_path / "out")
    config = dict(whole.config.model.backbone.anchors[0])
    config.pop("pretrained")
    anchor = create_anchor(config.pop("model"), 32, **config)
    load_pretrained(anchor, str(tmp_path / "out"))
    weights = whole.model.backbone.network.anchor(0).model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in anchor.model.state_dict().items())


@pytest.mark.slow
def test_loaded_layers_need_no_initialisation(folder: Path) -> None:
    """Loaded by ``load_from`` and by ``init_cfg``."""
    config = load_config(folder / "config.py")
    model = MODELS.build(config.model)
    assert not model.backbone.network.initialized
    load_checkpoint(model, str(folder))
    assert model.backbone.network.initialized
    config.model.init_cfg = dict(type="Pretrained", checkpoint=str(folder))
    model = MODELS.build(config.model)
    model.init_weights()
    assert model.backbone.network.initialized


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["stitch", "skipped", "anchor", "damaged", "nowhere", "folder", "half way"])
def test_refused_input_leaves_no_folder(
    wrong: str, trained: Callable[[Path], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(STITCHED)
    config, checkpoint, stitch, out = whole.config, whole.path, "S2-L6", tmp_path / "out"
    error: type[Exception] = ValueError
    if wrong == "stitch":
        stitch, says = "S4-L11", "no stitch 'S4-L11' in this space of 32"
    elif wrong == "skipped":
        stitch, says = "7", "7 is not in the space"
    elif wrong == "anchor":
        checkpoint = trained(SINGLE).path
        says = r"is not one of the model that the config describes. missing: "
    elif wrong == "damaged":
        checkpoint = tmp_path / "cut.pth"
        checkpoint.write_bytes(whole.path.read_bytes()[:1000])
        says = "cut.pth"
    elif wrong == "nowhere":
        checkpoint, says, error = tmp_path / "nowhere.pth", "nowhere", FileNotFoundError
    elif wrong == "folder":
        out.mkdir()
        (out / "file").write_text("mine")
        says = rf"{out} exists: set the output to a new folder, or to an empty one"
    else:

        def full(*args: Any) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(Config, "dump", full)
        says, error = "no space left", OSError
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=says):
        extract_stitch(config, checkpoint, stitch, out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_checkpoint_without_stitching_layers(trained: Callable[[Path], Trained], tmp_path: Path) -> None:
    whole = trained(STITCHED)
    weights = {name: tensor for name, tensor in whole.model.state_dict().items() if ".layers." not in name}
    torch.save({"state_dict": weights}, tmp_path / "without.pth")
    with pytest.raises(ValueError, match=r"missing: backbone\.network\.layers\.0_0-1_2\.weight"):
        extract_stitch(whole.config, tmp_path / "without.pth", "S", tmp_path / "out")
    assert os.listdir(tmp_path) == ["without.pth"]
