"""The inferencers of mmseg and mmdet on published folders: the predictions of our Predictor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmsnnet.apis import Predictor, load_config
from tests.apis.tiny_models import publish_tiny


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_tiny("segmentation", tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="module")
def images(segmentation: Path) -> list[str]:
    return sorted(map(str, (segmentation.parent / "data/images/validation").iterdir()))


def test_mmsegs_functions_load_a_published_folder(segmentation: Path, images: list[str]) -> None:
    from mmseg.apis import inference_model, init_model

    expected = [
        prediction.data_sample.pred_sem_seg.data for prediction in Predictor(segmentation, device="cpu")(images)
    ]
    assert len({tensor.numpy().tobytes() for tensor in expected}) > 1
    overlay = Predictor(segmentation, device="cpu").overlay
    for checkpoint in (segmentation, segmentation / "model.safetensors"):
        model = init_model(segmentation / "config.py", str(checkpoint), device="cpu")
        assert model.dataset_meta["classes"] == list(overlay.classes)
        assert model.dataset_meta["palette"] == [list(color) for color in overlay.palette]
        found = inference_model(model, images)
        for sample, tensor in zip(found, expected, strict=True):
            assert (sample.pred_sem_seg.data == tensor).float().mean() > 0.999


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_mmsegs_inferencer_runs_a_published_folder(
    task: str, segmentation: Path, images: list[str], tmp_path: Path
) -> None:
    from mmseg.apis import MMSegInferencer

    folder = segmentation if task == "segmentation" else publish_tiny("depth", tmp_path)
    inferencer = MMSegInferencer(
        str(folder / "config.py"), str(folder / "model.safetensors"), device="cpu", show_progress=False
    )
    found = inferencer(images, return_datasamples=False, batch_size=2)["predictions"]
    expected = Predictor(folder, device="cpu")(images)
    for prediction, ours in zip(found, expected, strict=True):
        sample = ours.data_sample
        if task == "depth":
            np.testing.assert_allclose(prediction, sample.pred_depth_map.data.squeeze().numpy(), rtol=1e-3)
        else:
            assert (prediction == sample.pred_sem_seg.data[0].numpy()).mean() > 0.999
    inferencer(images[0], out_dir=str(tmp_path / "out"))
    assert len(list((tmp_path / "out/vis").iterdir())) == 1


@pytest.mark.detection
def test_mmdets_inferencer_runs_a_published_folder(tmp_path: Path) -> None:
    from mmdet.apis import DetInferencer

    folder = publish_tiny("detection", tmp_path)
    images = sorted(map(str, (tmp_path / "data/val2017").iterdir()))
    inferencer = DetInferencer(
        str(folder / "config.py"), str(folder / "model.safetensors"), device="cpu", show_progress=False
    )
    found = inferencer(images, out_dir=str(tmp_path / "out"))["predictions"]
    expected = Predictor(folder, device="cpu")(images)
    for prediction, ours in zip(found, expected, strict=True):
        instances = ours.data_sample.pred_instances
        assert len(instances) > 0
        assert torch.allclose(torch.tensor(prediction["scores"]), instances.scores, atol=1e-3)
        assert torch.allclose(torch.tensor(prediction["bboxes"]), instances.bboxes, rtol=1e-2, atol=0.2)
    assert len(list((tmp_path / "out/vis").iterdir())) == len(images)


def test_the_toolboxes_read_our_configs_without_our_functions(segmentation: Path) -> None:
    """mmengine's Config alone imports what loads the weights safely."""
    config = Config.fromfile(segmentation / "config.py")
    assert config.model.type == load_config(segmentation / "config.py").model.type
