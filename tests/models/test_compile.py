"""Training with compiled blocks is the training that it was."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from tests.conftest import gpu

MakeSegmentor = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_batch(size: int = 32) -> dict[str, list[Any]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8) for _ in range(2)]
    samples = []
    for image in inputs:
        labels = torch.randint(8, (1, size, size), generator=generator)
        sample = SegDataSample(metainfo=dict(img_shape=image.shape[1:], ori_shape=image.shape[1:]))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def train(model: Any, steps: int = 6) -> tuple[list[str], list[float], dict[str, Any]]:
    """The stitches drawn, the losses, and the weights after a few steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapper = OptimWrapper(torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
    drawn, losses = [], []
    for _ in range(steps):
        losses.append(model.train().train_step(make_batch(), wrapper)["loss"].item())
        drawn.append(model.backbone.drawn.name)
    return drawn, losses, model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("with_cp", [False, True], ids=["", "with_cp"])
def test_a_compiled_backbone_trains_the_same(with_cp: bool, make_segmentor: MakeSegmentor) -> None:
    plain = make_segmentor(with_cp=with_cp)
    compiled = make_segmentor(with_cp=with_cp, compile=dict(backend="eager"))
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.utils.counters.clear()
    found, expected = train(compiled), train(plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert len(set(found[0])) > 1
    assert found[:2] == expected[:2]
    assert found[2].keys() == expected[2].keys()
    assert all(torch.equal(tensor, expected[2][name]) for name, tensor in found[2].items())


def test_it_evaluates_the_same(make_segmentor: MakeSegmentor) -> None:
    plain, compiled = make_segmentor().eval(), make_segmentor(compile=True).eval()
    compiled.load_state_dict(plain.state_dict())
    for stitch in plain.backbone.space:
        maps = []
        for model in (plain, compiled):
            model.backbone.set_stitch(stitch)
            with torch.no_grad():
                maps.append(model.encode_decode(make_images(), [dict(ori_shape=(32, 32), img_shape=(32, 32))]))
        assert torch.equal(*maps)


def make_images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("compile", ["inductor", 1, None])
def test_what_compile_takes(compile: Any, make_segmentor: MakeSegmentor) -> None:
    with pytest.raises(TypeError, match=r"compile is True, False or a dict of torch.compile's arguments; got"):
        make_segmentor(compile=compile)


@pytest.mark.slow
def test_one_stitch_alone_trains_compiled(make_segmentor: MakeSegmentor) -> None:
    """Of the anchors, the blocks that it lacks are not there to be compiled."""
    model = make_segmentor(only="S0-L2", compile=dict(backend="eager"), small=dict(drop_path_rate=0.1))
    _, losses, _ = train(model, 2)
    assert all(loss > 0 for loss in losses)


@gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_inductor_on_a_gpu(precision: torch.dtype, make_segmentor: MakeSegmentor) -> None:
    plain = make_segmentor().cuda().train()
    compiled = make_segmentor(compile=True).cuda().train()
    compiled.load_state_dict(plain.state_dict())
    images = make_images().cuda()
    tolerance = dict(rtol=1e-4, atol=1e-4) if precision == torch.float32 else dict(rtol=5e-2, atol=5e-2)
    with torch.autocast("cuda", dtype=precision, enabled=precision != torch.float32):
        for stitch in plain.backbone.space:
            (expected,) = plain.backbone.network(images, stitch, (3,))
            (found,) = compiled.backbone.network(images, stitch, (3,))
            torch.testing.assert_close(found, expected, **tolerance)


def test_a_copy_of_it_trains_uncompiled(make_segmentor: MakeSegmentor) -> None:
    """An average of its weights, say."""
    model = make_segmentor(compile=dict(backend="eager"))
    torch._dynamo.utils.counters.clear()
    train(copy.deepcopy(model), 2)
    assert not torch._dynamo.utils.counters["stats"]
