"""Clients get what the model predicts, as JSON and PNG."""

import base64
import json
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from mmsnnet.apis import Prediction, Predictor
from mmsnnet.apis.overlay import Overlay
from mmsnnet.serving.replies import describe
from tests.apis.tiny_models import LAYOUTS, publish_tiny

TASKS = [
    pytest.param(task, marks=[pytest.mark.detection, pytest.mark.slow] if task == "detection" else [])
    for task in LAYOUTS
]


@pytest.fixture(scope="module")
def predict(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prediction]:
    """``predict(task)``: what a tiny model of this task predicts for a picture of 48 x 64."""

    def make(task: str) -> Prediction:
        pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        photo = cv2.resize(pixels, (64, 48), interpolation=cv2.INTER_CUBIC)
        return Predictor(publish_tiny(task, tmp_path_factory.mktemp(task)), device="cpu")(photo)

    return make


def made_up(task: str, classes: tuple[str, ...] = (), size: tuple[int, int] = (2, 3), **values: Any) -> Prediction:
    """A prediction of a task with these values in its data sample."""
    sample = BaseDataElement()
    for name, value in values.items():
        sample.set_field(value, name)
    return Prediction(None, np.zeros((*size, 3), np.uint8), sample, "S", 1.0, None, Overlay(task, classes))


def picture(text: str) -> np.ndarray:
    """The array of a PNG in base64."""
    content = base64.b64decode(text, validate=True)
    assert content.startswith(b"\x89PNG")
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)


def through_json(prediction: Prediction, masks: bool) -> dict[str, Any]:
    """What a client reads; JSON knows neither NaN nor infinity."""
    return json.loads(json.dumps(describe(prediction, masks), allow_nan=False))


@pytest.mark.parametrize("task", TASKS)
def test_a_reply_says_what_the_model_predicts(predict: Callable[[str], Prediction], task: str) -> None:
    prediction = predict(task)
    plain, reply = through_json(prediction, False), through_json(prediction, True)
    assert "png" not in str(plain)
    assert plain.items() <= reply.items() or task == "detection"
    assert (plain["task"], plain["stitch"], plain["image_size"]) == (task, "L", [48, 64])
    sample = prediction.data_sample
    if task == "segmentation":
        segments = sample.pred_sem_seg.data[0].numpy()
        mask = picture(reply["mask_png"])
        assert mask.dtype == np.uint8 and np.array_equal(mask, segments)
        assert [found["label"] for found in plain["classes"]] == np.unique(segments).tolist()
        for found in plain["classes"]:
            assert found["share"] == pytest.approx((segments == found["label"]).mean(), abs=1e-6)
            assert found["name"] == prediction.overlay.classes[found["label"]]
        assert sum(found["share"] for found in plain["classes"]) == pytest.approx(1, abs=1e-5)
    elif task == "depth":
        depth = sample.pred_depth_map.data.squeeze().numpy()
        millimetres = picture(reply["depth_mm_png"])
        assert millimetres.dtype == np.uint16 and np.abs(millimetres / 1000 - depth).max() <= 0.00051
        expected = dict(min=depth.min(), mean=depth.mean(), max=depth.max())
        assert plain["depth_m"] == pytest.approx(expected, rel=1e-6)
    elif task == "classification":
        scores = [found["score"] for found in plain["classes"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1
        assert plain["classes"][0]["label"] == int(sample.pred_label) == int(sample.logits.argmax())
        assert plain["classes"][0]["name"] == prediction.overlay.name(int(sample.pred_label))
    else:
        found = sample.pred_instances
        assert len(plain["instances"]) == len(found) > 0
        for instance, label, score, box in zip(
            plain["instances"], found.labels, found.scores, found.bboxes, strict=True
        ):
            assert instance["label"] == label and instance["score"] == pytest.approx(float(score))
            assert instance["box"] == pytest.approx(box.tolist())


def test_many_classes_need_16_bits() -> None:
    segments = torch.tensor([[0, 255, 256], [999, 999, 65535]])
    reply = through_json(made_up("segmentation", pred_sem_seg=PixelData(data=segments[None])), True)
    mask = picture(reply["mask_png"])
    assert mask.dtype == np.uint16 and np.array_equal(mask, segments.numpy())
    assert [found["name"] for found in reply["classes"]] == [f"class {n}" for n in (0, 255, 256, 999, 65535)]
    assert [found["share"] for found in reply["classes"]] == [0.166667] * 3 + [0.333333, 0.166667]


def test_depth_is_in_millimetres_up_to_the_largest_of_16_bits() -> None:
    depth = torch.tensor([[0.0, 0.0004, 0.0006], [1.2345, 65.535, 80.0]])
    reply = through_json(made_up("depth", pred_depth_map=PixelData(data=depth[None])), True)
    assert picture(reply["depth_mm_png"]).tolist() == [[0, 0, 1], [1234, 65535, 65535]]
    assert reply["depth_m"]["max"] == 80


def test_few_classes_are_all_listed() -> None:
    reply = through_json(made_up("classification", ("cat", "dog"), logits=torch.tensor([0.0, 1.0])), True)
    assert [found["name"] for found in reply["classes"]] == ["dog", "cat"]
    assert sum(found["score"] for found in reply["classes"]) == pytest.approx(1)


@pytest.mark.parametrize("as_numpy", [False, True])
def test_instances_have_their_masks(as_numpy: bool) -> None:
    masks = torch.tensor([[[1, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.bool)
    found = InstanceData(
        bboxes=torch.tensor([[0.0, 0.0, 3.0, 2.0], [1.0, 1.0, 2.0, 2.0]]),
        scores=torch.tensor([0.5, 0.25]),
        labels=torch.tensor([1, 0]),
        masks=masks.numpy() if as_numpy else masks,
    )
    prediction = made_up("detection", ("cat", "dog"), pred_instances=found)
    reply = through_json(prediction, True)
    for instance, mask in zip(reply["instances"], masks.numpy(), strict=True):
        assert np.array_equal(picture(instance["mask_png"]), 255 * mask)
    bare = [
        dict(label=1, name="dog", score=0.5, box=[0, 0, 3, 2]),
        dict(label=0, name="cat", score=0.25, box=[1, 1, 2, 2]),
    ]
    assert through_json(prediction, False)["instances"] == bare


def test_an_image_may_have_no_instances() -> None:
    none = InstanceData(
        bboxes=torch.zeros(0, 4),
        scores=torch.zeros(0),
        labels=torch.zeros(0, dtype=torch.long),
        masks=torch.zeros(0, 2, 3),
    )
    assert through_json(made_up("detection", pred_instances=none), True)["instances"] == []


NAN = float("nan")
DIVERGED = dict(
    depth=dict(pred_depth_map=PixelData(data=torch.tensor([[[1.0, NAN]]]))),
    classification=dict(logits=torch.tensor([0.0, NAN])),
    detection=dict(
        pred_instances=InstanceData(
            bboxes=torch.tensor([[0.0, 0.0, float("inf"), 1.0]]), scores=torch.ones(1), labels=torch.tensor([0])
        )
    ),
)


@pytest.mark.parametrize("task", DIVERGED)
def test_what_json_lacks_is_an_error(task: str) -> None:
    """A model that diverged predicts NaN."""
    with pytest.raises(ArithmeticError, match="the model predicts NaN or infinity"):
        describe(made_up(task, **DIVERGED[task]))
