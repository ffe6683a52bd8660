"""Weights are compared by name and shape, and the differences said in settings."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mmsnnet.engine.resuming.difference import Verdict
from mmsnnet.engine.resuming.weights import compare_weights, summarize_partial_load
from mmsnnet.errors import SettingError

MakeSegmentor = Callable[..., nn.Module]


def texts(model: nn.Module, checkpoint: dict[str, Any]) -> list[str]:
    found = list(compare_weights(model, checkpoint, "iter_4.pth"))
    assert all(difference.verdict is Verdict.REFUSED for difference in found)
    return [difference.text for difference in found]


def saved(model: nn.Module) -> dict[str, Any]:
    return dict(meta={}, state_dict=model.state_dict())


def with_classes(make: Callable[..., dict[str, Any]], number: int, **kwargs: Any) -> nn.Module:
    from mmseg.registry import MODELS

    config = make(**kwargs)
    config["decode_head"] |= dict(num_classes=number)
    return MODELS.build(config)


def test_the_model_itself_fits(make_segmentor: MakeSegmentor) -> None:
    model = make_segmentor()
    assert texts(model, saved(model)) == []
    without = saved(model)
    for name in list(without["state_dict"]):
        if name.rpartition(".")[2] in ("grid", "draws"):  # an older version recorded neither
            del without["state_dict"][name]
    assert texts(model, without) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 5, 19, 150])
def test_another_number_of_classes(number: int, segmentor_config: Callable[..., dict[str, Any]]) -> None:
    model = with_classes(segmentor_config, number)
    assert texts(model, saved(with_classes(segmentor_config, 8))) == [
        "model.decode_head.num_classes: the checkpoint's decode_head.conv_seg is for 8 classes, the config's for "
        f"{number}"
    ]


@pytest.mark.parametrize("size", [64, (64, 32), (16, 64)])
def test_another_image_size(size: Any, segmentor_config: Callable[..., dict[str, Any]]) -> None:
    """Also where there are as many patches, four in the last case: the positions are others."""
    model = with_classes(segmentor_config, 8, img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert texts(model, saved(with_classes(segmentor_config, 8))) == [
        "model.backbone.img_size: the checkpoint's position embeddings are for 2 x 2 patches, the config's for "
        f"{height // 16} x {width // 16}"
    ]


def test_image_size_and_classes_are_both_said(segmentor_config: Callable[..., dict[str, Any]]) -> None:
    model = with_classes(segmentor_config, 19, img_size=64)
    found = texts(model, saved(with_classes(segmentor_config, 8)))
    assert [text.split(":")[0] for text in found] == ["model.backbone.img_size", "model.decode_head.num_classes"]


def test_other_anchors(segmentor_config: Callable[..., dict[str, Any]]) -> None:
    source = saved(with_classes(segmentor_config, 8))
    (wider,) = texts(with_classes(segmentor_config, 8, small=dict(embed_dim=40)), source)
    assert "of another shape: backbone.network.anchors.0" in wider and " more)" in wider
    (deeper,) = texts(with_classes(segmentor_config, 8, small=dict(depth=3)), source)
    assert "missing: backbone.network" in deeper
    source["state_dict"]["extra.weight"] = torch.zeros(2)
    (left,) = texts(with_classes(segmentor_config, 8), source)
    assert left == "model: the checkpoint's weights are of another model (left over: extra.weight (2,))"


def test_a_classifier_of_the_backbone(backbone_config: Callable[..., dict[str, Any]]) -> None:
    from mmsnnet.registry import MODELS

    def make(number: int) -> nn.Module:
        model = dict(type="mmsnnet.StitchedClassifier", backbone=backbone_config(), num_classes=number)
        return MODELS.build(model)

    (found,) = texts(make(10), saved(make(4)))
    assert found.startswith("model.backbone.num_classes: the checkpoint's ")
    assert found.endswith("is for 4 classes, the config's for 10")


class BoxHead(nn.Module):
    """The layers of mmdet's box head: a class for the background, four numbers for each class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fc_cls, self.fc_reg = nn.Linear(6, num_classes + 1), nn.Linear(6, 4 * num_classes)


@pytest.mark.parametrize(("recorded", "own"), [(80, 3), (3, 80), (20, 1), (1, 20)])
def test_box_heads_have_classes_too(recorded: int, own: int) -> None:
    roi_head, other = (nn.ModuleDict(dict(roi_head=nn.ModuleDict(dict(bbox=BoxHead(n))))) for n in (own, recorded))
    assert texts(roi_head, saved(other)) == [
        f"model.roi_head.bbox.num_classes: the checkpoint's roi_head.bbox.fc_cls is for {recorded} classes, the "
        f"config's for {own}"
    ]


def test_channels_are_no_classes() -> None:
    """Eight channels were made sixteen in a head of eight classes."""

    class Head(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.num_classes = 8
            self.conv, self.conv_seg = nn.Conv2d(4, channels, 1), nn.Conv2d(channels, 8, 1)

    (found,) = texts(nn.ModuleDict(dict(head=Head(8))), saved(nn.ModuleDict(dict(head=Head(16)))))
    assert "classes" not in found and "head.conv.weight (16, 4, 1, 1) instead of (8, 4, 1, 1)" in found


def test_what_is_resampled_is_loaded(segmentor_config: Callable[..., dict[str, Any]]) -> None:
    """``load_from`` takes another image size."""
    source = saved(with_classes(segmentor_config, 8))
    assert summarize_partial_load(with_classes(segmentor_config, 8, img_size=64), source, "iter_4.pth") is None


def test_counts_alone_are_no_weights(make_segmentor: MakeSegmentor) -> None:
    """A file with nothing but what records the state of training fits in nothing."""
    model = make_segmentor()
    records = {name: value for name, value in model.state_dict().items() if name.endswith(("grid", "draws"))}
    with pytest.raises(SettingError, match=r"nothing of checkpoint 'w\.pth' fits"):
        summarize_partial_load(model, dict(state_dict=records | {"other": torch.zeros(1)}), "w.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_numbers_of_another_kind_are_refused(dtype: torch.dtype, make_segmentor: MakeSegmentor) -> None:
    """mmengine would convert them without a word, also in a partial load."""
    model, name = make_segmentor(), "decode_head.conv_seg.weight"
    weights = model.state_dict()
    spoilt = {name: weights[name].to(dtype), "decode_head.conv_seg.bias": weights["decode_head.conv_seg.bias"].half()}
    kinds = rf"of another kind: {name} \(.*\) {str(dtype)[6:]} in place of"
    assert re.search(kinds, *texts(model, dict(state_dict=weights | spoilt)))
    with pytest.raises(SettingError, match=rf"load_from: checkpoint 'w\.pth' has tensors {kinds}"):
        summarize_partial_load(model, dict(state_dict=spoilt), "w.pth")


def test_the_names_of_data_parallel_models_fit(make_segmentor: MakeSegmentor) -> None:
    model = make_segmentor()
    prefixed = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert summarize_partial_load(model, dict(state_dict=prefixed), "w.pth") is None
    assert texts(model, dict(state_dict=prefixed)) == []
