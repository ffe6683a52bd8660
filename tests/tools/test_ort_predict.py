"""The example without torch: it resizes, slides and chooses as the toolboxes do."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from PIL import Image
from torch import Tensor

from mmsnnet.apis import build_model, load_config
from mmsnnet.apis.images import ImageLoader
from mmsnnet.apis.preprocessing import preprocessing

REPOSITORY = Path(__file__).parents[2]
CAMVID = REPOSITORY / "configs/camvid/vit-s_setr_1k_camvid-256x256.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ort_predict", REPOSITORY / "tools/deployment/ort_predict.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ort_predict"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [(40, 30), (200, 151), (64, 200), (13, 1)])
def test_bilinear_is_opencvs_and_torchs(program: ModuleType, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (75, 64, 4)).astype(np.float32)
    resized = program.bilinear(image, *size)
    expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(resized, expected, atol=1e-2)
    rows = slice(size[0] // 3, size[0] // 2)
    np.testing.assert_array_equal(program.bilinear(image, *size, rows), resized[rows])
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    aligned = F.interpolate(tensor, size, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(program.bilinear(image, *size, align_corners=True), aligned.numpy(), atol=1e-2)


def made_image(path: Path, size: tuple[int, int]) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
    Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def normalised(config: Config, path: Path) -> np.ndarray:
    """The input of a model, by the toolbox's own pipeline and preprocessor."""
    inputs = ImageLoader(config)(path)[1]["inputs"]
    preprocessor = build_model(config).data_preprocessor
    [*batch] = preprocessor(dict(inputs=[inputs], data_samples=None))["inputs"]
    return batch[0].numpy()


@pytest.mark.parametrize(
    ("name", "options", "limit"),
    [
        # One level of 255, because OpenCV resizes whole numbers by whole numbers.
        ("camvid/vit-s_setr_1k_camvid-256x256.py", dict(keep_ratio=True, scale=(300, 120)), 1.01 / 57),
        ("camvid/vit-s_setr_1k_camvid-256x256.py", dict(keep_ratio=False, scale=(90, 120)), 1.01 / 57),
        ("imagenet/stitched-vit-s-l_4e_cifar10-32x32.py", dict(crop_pct=0.8, interpolation="bicubic"), 1e-5),
        ("imagenet/stitched-vit-s-l_4e_cifar10-32x32.py", dict(crop_pct=None), 1e-5),
    ],
)
def test_inputs_are_those_of_the_pipeline(
    program: ModuleType, name: str, options: dict[str, Any], limit: float, tmp_path: Path
) -> None:
    config = load_config(REPOSITORY / "configs" / name)
    pipeline = config.test_dataloader.dataset.pipeline
    if "scale" in options:
        pipeline.insert(1, dict(type="Resize", **options))
    else:
        pipeline[1].update(options)
    path = made_image(tmp_path / "image.png", (104, 136))
    steps = preprocessing(config)
    assert steps["others"] == []
    given = program.prepare(program.read_image(path), steps)[0]
    expected = normalised(config, path)
    assert given.shape == expected.shape and np.abs(given - expected).max() <= limit


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (dict(type="Resize", scale=(60, 60), interpolation="nearest"), "Resize(interpolation='nearest')"),
        (dict(type="Resize", scale_factor=2.0), "Resize(scale_factor=2.0)"),
        (dict(type="RandomFlip", prob=1.0), "RandomFlip"),
    ],
)
def test_what_the_program_cannot_do_is_refused(program: ModuleType, step: dict[str, Any], named: str) -> None:
    config = load_config(CAMVID)
    config.test_dataloader.dataset.pipeline.insert(1, step)
    steps = preprocessing(config)
    assert steps["others"] == [named]
    with pytest.raises(program.Mistake, match="needs the toolbox: use Predictor"):
        program.prepare(np.zeros((8, 8, 3), np.uint8), steps)
    bands = {**steps, "others": [], "channels": 4}
    with pytest.raises(program.Mistake, match="images of 4 bands"):
        program.prepare(np.zeros((8, 8, 3), np.uint8), bands)


@pytest.mark.parametrize("size", [(64, 64), (70, 130), (90, 64)])
def test_windows_are_mmsegs(program: ModuleType, size: tuple[int, int]) -> None:
    """Their places show in what each returns: its pixels minus their mean."""
    inference = dict(mode="slide", crop_size=(64, 64), stride=(42, 42))
    config = load_config(CAMVID)
    config.model.test_cfg = inference
    model = build_model(config)
    model.out_channels = 3

    def relative(window: Tensor, metas: Any = None) -> Tensor:
        return window - window.mean(dim=(2, 3), keepdim=True)

    model.encode_decode = relative
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size)
    expected = model.slide_inference(images, [meta])
    graph = SimpleNamespace(inference=inference, size=(64, 64))
    graph.run = lambda window, names: [relative(torch.from_numpy(window)).numpy()]
    graph._window = lambda *arguments: program.Graph._window(graph, *arguments)
    graph._slide = lambda *arguments: program.Graph._slide(graph, *arguments)
    np.testing.assert_allclose(program.Graph.maps(graph, images.numpy(), "logits"), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("metric", "higher", "metrics", "best"),
    [
        ("mIoU", True, dict(a=30.0, b=40.0, c=35.0), "b"),
        ("mIoU", True, dict(a=30.0, b=None, c=None), "a"),  # not the costliest, whose quality is unknown
        ("abs_rel", False, dict(a=0.3, b=0.2, c=0.25), "b"),
        ("mIoU", True, dict(a=40.0, b=40.0, c=40.0), "a"),  # the cheapest of equal ones
        (None, True, dict(a=None, b=None, c=None), "c"),  # the costliest where nothing is known
    ],
)
def test_the_best_stitch_within_a_budget(
    program: ModuleType, metric: str | None, higher: bool, metrics: dict[str, float | None], best: str
) -> None:
    stitches = [
        dict(id=index, name=name, flops=(index + 1) * 10**9, metrics={} if value is None else {metric: value})
        for index, (name, value) in enumerate(metrics.items())
    ]
    manifest = dict(stitches=stitches, metric=metric, higher=higher)
    args = SimpleNamespace(stitch=None, max_gflops=3.0, max_latency_ms=None)
    assert program.choose(Path(), manifest, args)["name"] == best
    args.max_gflops = 1.0
    assert program.choose(Path(), manifest, args)["name"] == "a"
    args.max_gflops = 0.5
    with pytest.raises(program.Mistake, match="below the cheapest stitch, which needs 1 GFLOPs"):
        program.choose(Path(), manifest, args)
