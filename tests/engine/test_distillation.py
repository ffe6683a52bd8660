"""Distillation: what its losses are, who teaches whom, and what is refused."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn

from mmsnnet.engine.distillation import Distillation, features_distance
from mmsnnet.engine.runner.train_step import several_stitches
from mmsnnet.errors import SettingError
from mmsnnet.models import StitchedClassifier
from mmsnnet.registry import MODELS

Make = Callable[..., Any]
# Without batch norms, so that training and evaluation mode agree.
HEAD = dict(type="FCNHead", num_convs=0, concat_input=False, in_channels=48, channels=48, in_index=1)
HEAD |= dict(align_corners=False, dropout_ratio=0)


@pytest.fixture
def make_classifier(backbone_config: Callable[..., dict[str, Any]], randomise: Callable[..., None]) -> Make:
    def make(number: int = 2, stitches: int = 2, **changes: Any) -> StitchedClassifier:
        config = backbone_config()
        config["anchors"] = config["anchors"][-number:]
        model = StitchedClassifier(config, **{"num_classes": 4, **changes})
        randomise(model)
        for layer in model.backbone.network.layers.values():
            layer.initialized = True
        model.backbone.stitches_per_step = stitches
        return model.train()

    return make


@pytest.fixture
def make_segmentor(segmentor_config: Callable[..., dict[str, Any]], randomise: Callable[..., None]) -> Make:
    def configure(classes: int = 5, number: int = 2, **changes: Any) -> ConfigDict:
        config = segmentor_config(out_indices=(1, 3))
        config["backbone"]["anchors"] = config["backbone"]["anchors"][-number:]
        config["decode_head"] = HEAD | dict(num_classes=classes)
        del config["auxiliary_head"]
        return ConfigDict(config | dict(type="mmsnnet.EncoderDecoder") | changes)

    def make(stitches: int = 2, **changes: Any) -> Any:
        model = MODELS.build(configure(**changes))
        randomise(model)
        for layer in model.backbone.network.layers.values():
            layer.initialized = True
        model.backbone.stitches_per_step = stitches
        return model.train()

    make.config = configure
    return make


def labels(number: int = 2) -> list[BaseDataElement]:
    return [BaseDataElement(gt_label=index % 4) for index in range(number)]


def label_maps(number: int = 2, classes: int = 5) -> list[BaseDataElement]:
    from mmseg.structures import SegDataSample

    random = torch.Generator().manual_seed(1)
    maps = torch.randint(classes, (number, 1, 32, 32), generator=random)
    return [SegDataSample(gt_sem_seg=PixelData(data=one), metainfo=dict(img_shape=(32, 32))) for one in maps]


def step(model: Any, images: Tensor, truth: Any, distillation: Distillation | None, iteration: int = 0) -> Any:
    """The losses of each pass of a step."""
    with several_stitches(model, distillation, iteration):
        return model(images.clone(), truth, mode="loss")


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Properties


def test_a_teacher_equal_to_the_student_teaches_nothing(
    make_segmentor: Make, make_images: Callable[..., Tensor]
) -> None:
    """With one anchor, each pass of a step is the same."""
    model = make_segmentor(number=1)
    losses = step(model, make_images(2), label_maps(), Distillation(model, features=1.0, outputs=1.0))
    names = ("distill.loss_features", "distill.loss_outputs")
    assert not any(name in losses[0] for name in names)
    assert all(losses[1][name] == 0 for name in names)
    changed = gradients(model, sum(losses[1][name] for name in names))
    assert all(gradient.abs().max() < 1e-6 for gradient in changed.values())


def test_a_frozen_copy_teaches_nothing_at_first(
    make_segmentor: Make, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = make_segmentor(number=1, stitches=1)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "teacher.pth")
    teacher = dict(model=make_segmentor.config(number=1), checkpoint=str(tmp_path / "teacher.pth"))
    distillation = Distillation(model, features=1.0, outputs=1.0, teacher=teacher)
    (losses,) = step(model, make_images(2), label_maps(), distillation)
    for name in ("distill.loss_features", "distill.loss_outputs"):
        torch.testing.assert_close(losses[name], torch.tensor(0.0), rtol=0, atol=1e-10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    (losses,) = step(model, make_images(2), label_maps(), distillation)
    assert losses["distill.loss_features"] > 1e-4 and losses["distill.loss_outputs"] > 1e-4
    assert not any(parameter.requires_grad for parameter in distillation.teacher.parameters())
    assert not distillation.teacher.training


@pytest.mark.parametrize("frozen", [False, True], ids=["in place", "frozen teacher"])
def test_losses_and_gradients_are_those_of_full_precision_under_autocast(
    frozen: bool, make_segmentor: Make, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    """But for the rounding of bfloat16; the weights and their gradients stay in float32."""
    model = make_segmentor()
    teacher = None
    if frozen:
        other = make_segmentor(number=1)
        torch.save(dict(state_dict=other.state_dict()), tmp_path / "teacher.pth")
        teacher = dict(model=make_segmentor.config(number=1), checkpoint=str(tmp_path / "teacher.pth"))
    names = ("distill.loss_features", "distill.loss_outputs")
    draws, results = model.backbone.draws, []
    for autocast in (False, True):
        model.backbone.draws = draws
        distillation = Distillation(model, features=1.0, outputs=1.0, teacher=teacher)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            passes = step(model, make_images(2), label_maps(), distillation)
        taught = [losses for losses in passes if names[0] in losses]
        assert len(taught) == (2 if frozen else 1)
        changed = gradients(model, sum(losses[name] for losses in taught for name in names))
        results.append((torch.stack([losses[name].detach() for losses in taught for name in names]), changed))
    (exact, exact_gradients), (mixed, mixed_gradients) = results
    assert mixed.dtype == torch.float32 and exact.min() > 1e-3
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=1e-4)
    assert exact_gradients.keys() == mixed_gradients.keys()
    flat, other_flat = (
        torch.cat([gradient.flatten() for gradient in found.values()]) for found in (exact_gradients, mixed_gradients)
    )
    assert other_flat.dtype == torch.float32 and (flat - other_flat).norm() < 0.05 * flat.norm()


def test_a_stock_backbone_teaches(make_segmentor: Make, make_images: Callable[..., Tensor], tmp_path: Path) -> None:
    """mmseg's own model gives logits, and maps if their shapes agree."""
    config = make_segmentor.config(number=1)
    config["type"] = "mmseg.EncoderDecoder"
    config["backbone"] = dict(type="mmseg.ResNetV1c", depth=18, num_stages=2, strides=(1, 2), dilations=(1, 1))
    config["backbone"] |= dict(out_indices=(0, 1))
    config["decode_head"] |= dict(in_channels=128, channels=128)
    torch.save(dict(state_dict=MODELS.build(config).state_dict()), tmp_path / "stock.pth")
    teacher = dict(model=ConfigDict(config), checkpoint=str(tmp_path / "stock.pth"))
    model, images = make_segmentor(stitches=1), make_images(2)
    distillation = Distillation(model, outputs=1.0, teacher=teacher)
    (losses,) = step(model, images, label_maps(), distillation)
    assert losses["distill.loss_outputs"] > 0
    distillation = Distillation(model, features=1.0, teacher=teacher)
    with pytest.raises(SettingError, match=r"those of the model are .*48.*, those of the teacher .*128"):
        step(model, images, label_maps(), distillation)


def test_the_costliest_stitch_teaches_and_learns_from_its_labels_alone(
    make_classifier: Make, make_images: Callable[..., Tensor]
) -> None:
    """The gradients are those of losses written out here, from separate passes."""
    model, images = make_classifier(), make_images(2)
    other = copy.deepcopy(model).eval()
    distillation = Distillation(model, outputs=0.7, temperature=2.0, task=0.3)
    found = gradients(model, sum(sum(losses.values()) for losses in step(model, images, labels(), distillation)))

    truth = torch.tensor([sample.gt_label for sample in labels()])
    logits = {}
    for name in ("L", "S"):
        other.backbone.set_stitch(name)
        logits[name] = other.backbone(images)
    target = (logits["L"].detach() / 2).softmax(1)
    divergence = F.kl_div((logits["S"] / 2).log_softmax(1), target, reduction="batchmean")
    loss = F.cross_entropy(logits["L"], truth) + 0.3 * F.cross_entropy(logits["S"], truth) + 0.7 * 4 * divergence
    expected = gradients(other, loss)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_hard_labels_are_the_teachers_classes(make_classifier: Make, make_images: Callable[..., Tensor]) -> None:
    model, images = make_classifier(), make_images(3)
    losses = step(model, images, labels(3), Distillation(model, outputs=0.5, task=0.5, hard=True))
    model.eval()
    model.backbone.set_stitch("L")
    predicted = model.backbone(images).argmax(1)
    model.backbone.set_stitch("S")
    logits = model.backbone(images)
    torch.testing.assert_close(losses[1]["distill.loss_outputs"], 0.5 * F.cross_entropy(logits, predicted))
    truth = torch.tensor([sample.gt_label for sample in labels(3)])
    torch.testing.assert_close(losses[1]["loss"], 0.5 * F.cross_entropy(logits, truth))


def test_maps_are_compared_relative_to_the_teachers() -> None:
    target = [torch.ones(2, 3, 4, 4), torch.full((2, 5, 2, 2), 2.0)]
    features = [torch.ones(2, 3, 4, 4) * 1.5, torch.full((2, 5, 2, 2), 4.0)]
    assert features_distance(features, target).item() == pytest.approx((0.25 + 1.0) / 2)
    target[1][0] *= 10  # the images of a rank do not change each other's weight
    features[1][0] *= 10
    assert features_distance(features, target).item() == pytest.approx((0.25 + 1.0) / 2)


def test_pixels_are_averaged(make_segmentor: Make, make_images: Callable[..., Tensor]) -> None:
    model, images = make_segmentor(), make_images(2)
    losses = step(model, images, label_maps(), Distillation(model, outputs=1.0))
    model.eval()
    logits = {}
    for name in ("L", "S"):
        model.backbone.set_stitch(name)
        logits[name] = model(images, mode="tensor").permute(0, 2, 3, 1).flatten(0, 2)
    expected = F.kl_div(logits["S"].log_softmax(1), logits["L"].softmax(1), reduction="batchmean")
    torch.testing.assert_close(losses[1]["distill.loss_outputs"], expected)


@pytest.mark.parametrize(("iteration", "share"), [(0, 0.25), (2, 0.75), (3, 1.0), (99, 1.0)])
def test_the_weights_grow_in_the_warm_up(
    iteration: int, share: float, make_classifier: Make, make_images: Callable[..., Tensor]
) -> None:
    images = make_images(2)
    found = []
    for settings in (dict(), dict(warmup_iters=4)):
        model = make_classifier()
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
        losses = step(model, images, labels(), Distillation(model, outputs=1.0, **settings), iteration)
        found.append(losses[1]["distill.loss_outputs"])
    torch.testing.assert_close(found[1], share * found[0])


def test_the_teacher_sees_images_in_its_own_normalisation(
    make_classifier: Make, make_images: Callable[..., Tensor], backbone_config: Make, tmp_path: Path
) -> None:
    def preprocessor(mean: float, std: float) -> dict[str, Any]:
        return dict(type="mmengine.ImgDataPreprocessor", mean=[mean] * 3, std=[std] * 3)

    model = make_classifier(stitches=1, data_preprocessor=preprocessor(100.0, 50.0))
    teacher = dict(type="mmsnnet.StitchedClassifier", backbone=backbone_config(), num_classes=4)
    teacher["data_preprocessor"] = preprocessor(0.0, 255.0)
    torch.save(dict(state_dict=MODELS.build(ConfigDict(teacher)).state_dict()), tmp_path / "teacher.pth")
    settings = dict(model=ConfigDict(teacher), checkpoint=str(tmp_path / "teacher.pth"))
    distillation = Distillation(model, outputs=1.0, teacher=settings)
    seen = []
    distillation.teacher.backbone.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    images = make_images(2)
    step(model, images, labels(), distillation)
    torch.testing.assert_close(seen[0] * 255, images * 50 + 100)


# Errors


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(), "teaches nothing"),
        (dict(outputs=-1.0), "outputs must be a number of 0 or more, got -1.0"),
        (dict(outputs="1"), "outputs must be a number of 0 or more, got '1'"),
        (dict(features=1.0), "the backbone of a classifier returns logits"),
        (dict(outputs=1.0, temperature=0), "temperature must be above 0"),
        (dict(outputs=1.0, temperature=2.0, hard=True), "1 with hard=True"),
        (dict(outputs=0.0, features=1.0, hard=True), "hard=True needs outputs"),
        (dict(outputs=1.0, hard="no"), "hard must be True or False, got 'no'"),
        (dict(outputs=1.0, teacher=dict(checkpoint="x.pth")), "needs one model"),
        (dict(outputs=1.0, teacher=dict(model=dict(type="A"), config="a.py")), "needs one model"),
        (dict(outputs=1.0, teacher=dict(model=dict(depth=18))), "has no model with a type"),
        (dict(outputs=1.0, teacher=dict(model=dict(type="NoModel"))), "teacher cannot be built: .*NoModel"),
        (
            dict(outputs=1.0, teacher=dict(model=dict(type="mmsnnet.StitchedClassifier"))),
            "cannot be built: .*'backbone'",
        ),
        (
            dict(outputs=1.0, teacher=dict(model=dict(type="mmsnnet.StitchedClassifier", backbone="x"))),
            "teacher cannot be built",
        ),
        (dict(outputs=1.0, teacher=dict(config=3)), r"teacher\.config must be the path of a config, got 3"),
        (dict(outputs=1.0, teacher=dict(modle={})), "unknown key 'modle'; it takes model, config, checkpoint"),
        (dict(outputs=float("nan")), "must be a number of 0 or more, got nan"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], text: str, make_classifier: Make) -> None:
    with pytest.raises(SettingError, match=text):
        Distillation(make_classifier(), **settings)


def test_a_teacher_for_another_task(make_classifier: Make, make_segmentor: Make, backbone_config: Make) -> None:
    teacher = dict(type="mmsnnet.StitchedClassifier", backbone=backbone_config(), num_classes=7)
    with pytest.raises(SettingError, match="the model predicts 4 classes, the teacher 7 classes"):
        Distillation(make_classifier(), outputs=1.0, teacher=dict(model=ConfigDict(teacher)))


def test_a_teacher_has_weights(make_classifier: Make, backbone_config: Make) -> None:
    teacher = dict(type="mmsnnet.StitchedClassifier", backbone=backbone_config(), num_classes=4)
    with pytest.raises(SettingError, match="random weights"):
        Distillation(make_classifier(), outputs=1.0, teacher=dict(model=ConfigDict(teacher)))
    with pytest.raises(FileNotFoundError, match=r"distill\.teacher\.config: there is no file 'none\.py'"):
        Distillation(make_classifier(), outputs=1.0, teacher=dict(config="none.py"))


def test_what_teaches_has_weights(make_segmentor: Make, backbone_config: Make) -> None:
    """An anchor, a stitching layer or a head without any is named; what does not teach may be random."""
    model = make_segmentor()

    def refused(changes: dict[str, Any], **settings: Any) -> str:
        config = make_segmentor.config()
        for anchor, pretrained in zip(config["backbone"]["anchors"], changes.pop("pretrained"), strict=True):
            anchor["pretrained"] = pretrained
        config["backbone"].update(changes)
        with pytest.raises(SettingError, match="would have random weights") as caught:
            Distillation(model, teacher=dict(model=config), **settings)
        return str(caught.value).partition(" would")[0].removeprefix("train_cfg.distill.teacher: ")

    assert refused(dict(pretrained=["a.pth", None]), features=1.0) == "anchor 1 of its backbone"
    both = ["a.pth", "b.pth"]
    crossing = refused(dict(pretrained=both, stitch="S0-L2"), features=1.0)
    assert crossing == "the stitching layers of its stitch S0-L2"
    assert refused(dict(pretrained=[None, "b.pth"]), outputs=1.0) == "its decode_head"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("data = 1", r"teacher\.config has no model with a type"),
        ("model = dict(", r"teacher\.config: '.*a\.py' is no config: "),
        ("model = dict(type='mmengine.ImgDataPreprocessor')", "ImgDataPreprocessor has no backbone"),
        (None, r"teacher\.config: '.*' is a folder: give the path of a config"),
    ],
)
def test_a_teachers_config_describes_a_model(
    text: str | None, error: str, make_classifier: Make, tmp_path: Path
) -> None:
    path = tmp_path if text is None else tmp_path / "a.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingError, match=error):
        Distillation(make_classifier(), outputs=1.0, teacher=dict(config=str(path)))


def test_a_teacher_returns_the_maps_of_training(
    make_segmentor: Make, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    """Those of auxiliary heads too, which evaluation mode skips. Others are refused before the first step."""
    backbone = make_segmentor.config(number=1)["backbone"] | dict(out_indices=dict(train=(1, 3), test=(3,)))
    model = make_segmentor(number=1, stitches=1, backbone=backbone)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "teacher.pth")
    config = make_segmentor.config(number=1, backbone=backbone)
    teacher = dict(model=config, checkpoint=str(tmp_path / "teacher.pth"))
    (losses,) = step(model, make_images(2), label_maps(), Distillation(model, features=1.0, teacher=teacher))
    torch.testing.assert_close(losses["distill.loss_features"], torch.tensor(0.0), rtol=0, atol=1e-10)
    assert config["backbone"]["out_indices"] == dict(train=(1, 3), test=(3,))  # the caller's stays
    config["backbone"]["out_indices"] = (3,)
    with pytest.raises(SettingError, match=r"maps of equal channels: those of the model are 48, 48, .* teacher 48"):
        Distillation(model, features=1.0, teacher=teacher)


def test_a_teacher_with_another_order_of_channels(make_segmentor: Make) -> None:
    config = make_segmentor.config()
    config["data_preprocessor"]["bgr_to_rgb"] = True
    with pytest.raises(SettingError, match="bgr_to_rgb"):
        Distillation(make_segmentor(), outputs=1.0, teacher=dict(model=config))


def test_a_head_with_one_logit(make_segmentor: Make, make_images: Callable[..., Tensor]) -> None:
    """A binary head's logit z is the pair (0, z)."""
    loss = dict(type="CrossEntropyLoss", use_sigmoid=True)
    head = HEAD | dict(num_classes=2, out_channels=1, threshold=0.5, loss_decode=loss)
    model, images = make_segmentor(decode_head=head), make_images(2)
    losses = step(model, images, label_maps(classes=2), Distillation(model, outputs=1.0))
    model.eval()
    chances = {}
    for name in ("L", "S"):
        model.backbone.set_stitch(name)
        chances[name] = model(images, mode="tensor").sigmoid()
    p, q = chances["L"], chances["S"]
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(losses[1]["distill.loss_outputs"], expected)
    assert math.isfinite(float(expected)) and expected > 0
