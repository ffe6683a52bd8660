"""Taps of traced, exported and copied models; properties compute nothing."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmsnnet.models import StitchedBackbone, Taps

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
PER_MODE = dict(train=(1, 3), test=(3,))


def equal(actual: Any, expected: Any) -> bool:
    """Whether two structures have the same tensors; an empty one stands for None."""
    pairs = list(zip(actual, expected, strict=True))
    return all(torch.equal(a, b) if b is not None else a is None or not a.numel() for a, b in pairs)


@pytest.fixture
def taps(make_backbone: Callable[..., StitchedBackbone], make_images: Callable[..., Tensor]) -> Taps:
    with torch.no_grad():
        return make_backbone(out_indices=PER_MODE).eval()(make_images())


def test_pytrees_keep_maps_class_tokens_and_gaps(taps: Taps) -> None:
    leaves, spec = pytree.tree_flatten(taps)
    assert taps[0] is None and len(leaves) == 4  # a map, its class token, and None twice
    rebuilt = pytree.tree_unflatten(leaves, spec)
    assert type(rebuilt) is Taps and equal(rebuilt, taps) and equal(rebuilt.class_tokens, taps.class_tokens)
    doubled = pytree.tree_map(lambda leaf: leaf if leaf is None else 2 * leaf, taps)
    assert equal(doubled.class_tokens, [None, 2 * taps.class_tokens[1]])


def test_copies_and_pickles_keep_class_tokens(taps: Taps) -> None:
    for copied in (copy.copy(taps), copy.deepcopy(taps), pickle.loads(pickle.dumps(taps))):
        assert type(copied) is Taps and equal(copied, taps) and equal(copied.class_tokens, taps.class_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("out_indices", [None, PER_MODE, (0, 3)])
def test_a_backbone_is_traced(
    out_indices: Any, make_backbone: Callable[..., StitchedBackbone], make_images: Callable[..., Tensor]
) -> None:
    backbone, images = make_backbone(out_indices=out_indices).eval(), make_images()
    with torch.no_grad():
        traced = torch.jit.trace(backbone, images)
        assert equal(traced(images), backbone(images))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_a_backbone_is_exported_and_saved(
    strict: bool, make_backbone: Callable[..., StitchedBackbone], make_images: Callable[..., Tensor]
) -> None:
    backbone, images = make_backbone(out_indices=PER_MODE).eval(), make_images()
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(backbone, (images,), strict=strict), buffer)
    buffer.seek(0)
    with torch.no_grad():
        actual, expected = torch.export.load(buffer).module()(images), backbone(images)
    assert type(actual) is Taps and equal(actual, expected) and equal(actual.class_tokens, expected.class_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("stitch", ["S", "S0-L2", "L"])
def test_a_segmentor_is_traced_and_exported(
    stitch: str, make_segmentor: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    model, images = make_segmentor().eval(), make_images()
    model.backbone.set_stitch(stitch)
    with torch.no_grad():
        expected = model(images)
        traced = torch.jit.trace(model, images)
        assert torch.equal(traced(images), expected)
        more = make_images(5, seed=1)
        torch.testing.assert_close(traced(more), model(more))
        assert torch.equal(torch.export.export(model, (images,)).module()(images), expected)


def test_no_property_of_a_module_computes_or_traces(
    make_segmentor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.jit reads every property of every module while it traces a forward."""
    model = make_segmentor()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a property computes")

    monkeypatch.setattr("mmsnnet.models.backbones.stitched_backbone.cost_model", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__call__", refuse)
        for module in model.modules():
            for name, _ in inspect.getmembers(type(module), lambda member: isinstance(member, property)):
                getattr(module, name)
