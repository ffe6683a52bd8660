"""Hierarchical anchors against timm's own models, and stitched networks of them."""

import copy
import json
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from timm.models import metaformer
from torch import Tensor

from mmsnnet.stitching import Anchor, StitchedNetwork, StitchSpace, cost_model, create_anchor, load_pretrained
from mmsnnet.stitching.anchors.base import CLASSIFIER, STEM, Component
from mmsnnet.stitching.least_squares import NormalEquations

# A tiny model of each family, with an image size that is no square where the family takes one.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = dict(
    swin=("swin_tiny_patch4_window7_224", dict(embed_dim=16, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8)), (64, 96)),
    swinv2=("swinv2_tiny_window8_256", dict(embed_dim=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8)), (64, 96)),
    convnext=("convnext_tiny", dict(dims=(16, 24, 32, 40), depths=(2, 2, 3, 2)), (64, 96)),
    convnextv2=("convnextv2_atto", dict(dims=(16, 24, 32, 40), depths=(1, 2, 2, 1)), (64, 96)),
    resnet=("resnet18", dict(channels=(16, 24, 32, 40)), (64, 96)),
    seresnext=("seresnext26d_32x4d", dict(layers=(1, 2, 2, 1), channels=(32, 64, 64, 64)), (64, 96)),
    resnetv2=("resnetv2_50", dict(channels=(32, 48, 64, 80), layers=(1, 2, 2, 1)), (64, 96)),
    regnet=("regnety_002", dict(depth=7), (64, 96)),
    efficientnet=("tinynet_e", {}, (64, 96)),
    mobilenetv3=("mobilenetv3_small_050", {}, (64, 96)),
    mambaout=("mambaout_femto", dict(depths=(1, 2, 2, 1), dims=(16, 24, 32, 40)), (64, 96)),
    caformer=("caformer_s18", {}, (32, 64)),
    poolformer=("poolformerv2_s12", {}, (32, 64)),
    levit=("levit_128s", dict(embed_dim=(32, 48, 64), key_dim=8, num_heads=(2, 3, 4), depth=(2, 3, 2)), (64, 96)),
    pvt=("pvt_v2_b0", dict(depths=(2, 2, 3, 2), embed_dims=(16, 32, 40, 64)), (64, 96)),
)
CLASSES = 10
# timm's metaformers take neither depths nor widths as arguments.
TINY_METAFORMER = dict(depths=(1, 2, 2, 1), dims=(32, 32, 64, 64))
PUBLISHED = Path(__file__).parents[1] / "published"
SKIPPED = dict(deit_ti_s_b=(), swin_ti_s_b=(3,), resnet18_resnet50=(0, 3), resnet18_swin_ti=(0, 3), levit_192_256=(2,))


def make(family: str, classifier: bool = True, **changes: Any) -> Anchor:
    name, settings, size = FAMILIES[family]
    settings = settings | (dict(num_classes=CLASSES) if classifier else {}) | changes
    published = metaformer._create_metaformer
    with patch.object(metaformer, "_create_metaformer", lambda *a, **known: published(*a, **known | TINY_METAFORMER)):
        anchor = create_anchor(name, size, classifier=classifier, **settings).eval()
    with torch.no_grad():  # statistics, too, that differ from their start
        for buffer in anchor.buffers():
            if buffer.is_floating_point() and buffer.ndim == 1:
                buffer.add_(torch.rand_like(buffer), alpha=0.1)
    return anchor


def images(anchor: Any, batch: int = 2) -> Tensor:
    return torch.randn(batch, anchor.in_chans, *anchor.img_size)


def identity_layers(network: StitchedNetwork) -> None:
    for key in network.space.layers:
        layer = network.layer(key)
        layer.set_base(torch.eye(layer.out_features), torch.zeros(layer.out_features))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_anchor_is_timms_model_to_the_bit(family: str) -> None:
    """Its logits, and the maps of its stages among those that ``forward_intermediates`` gives."""
    anchor = make(family)
    x = images(anchor)
    stem = anchor.stem(x)
    outputs = [features for _, features in anchor.run(stem)]
    assert torch.equal(anchor.classify(outputs[-1]), anchor.model(x))
    intermediates = anchor.model.forward_intermediates(x, intermediates_only=True)
    maps = [outputs[end - 1].map() for end in accumulate(anchor.stages)]
    assert len(maps) >= len(intermediates) - 1  # some families add their stem
    for expected in intermediates[-1:] if family in ("efficientnet", "mobilenetv3") else intermediates[-len(maps) :]:
        assert any(torch.equal(one, expected) for one in maps)
    for features, known in zip((stem, *outputs), anchor.geometry(anchor.img_size), strict=True):
        assert (features.grid, features.layout, features.data.shape[1:]) == (
            known.grid,
            known.layout,
            known.data.shape[1:],
        )
        assert features.rows().shape == (2 * features.map()[0, 0].numel(), features.channels)
        assert torch.equal(features.rows().view(2, *features.grid, -1).movedim(-1, 1), features.map())
    assert anchor.widths == tuple(features.channels for features in outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_is_in_one_component(family: str) -> None:
    anchor = make(family)
    listed = [p for component in anchor.components for p in anchor.parameters_of(component)]
    assert len(listed) == len(set(listed)) and set(listed) == set(anchor.parameters())
    assert [c.block for c in anchor.components if c.role == "block"] == list(range(anchor.depth))
    # Layers that depend on the number of classes belong to the classifier, and not to the stem.
    classifiers = anchor.model.get_classifier()
    heads = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    in_heads = {parameter for head in heads for parameter in head.parameters()}
    assert in_heads and in_heads <= set(anchor.parameters_of(CLASSIFIER))
    assert sum(anchor.stages) == anchor.depth


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["two_way", "sliding_window"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_twins_joined_by_identity_layers_are_the_anchor_on_every_route(family: str, scheme: str) -> None:
    """Routes of the sliding window cross ahead by one block where stages have as many blocks, and serve no taps."""
    anchor = make(family)
    space = StitchSpace.of(scheme, [anchor.stages] * 2)
    network = StitchedNetwork([anchor, copy.deepcopy(anchor)], space, rank=0).eval()
    identity_layers(network)
    x = images(anchor, 1)
    logits, outputs = anchor.model(x), [features.map() for _, features in anchor.run(anchor.stem(x))]
    ends = [end - 1 for end in accumulate(anchor.stages)]
    for stitch in space:
        assert torch.equal(network.classify(x, stitch), logits)
    for stitch in space.stitches[:: 1 + len(space) // 40] if scheme == "two_way" else ():
        assert all(map(torch.equal, network(x, stitch, ends), [outputs[end] for end in ends]))


@pytest.mark.parametrize("family", ["swin", "convnext", "resnet", "levit", "pvt"])
def test_recomputed_activations_give_the_same_gradients(family: str) -> None:
    """And the same statistics of batch norms, which the second pass leaves alone."""
    start = make(family, classifier=False).train()
    x, gradients, buffers = images(start), [], []
    for recompute in (False, True):
        anchor = copy.deepcopy(start)
        torch.manual_seed(0)  # of stochastic depth
        for _, features in anchor.run(anchor.stem(x), recompute=recompute):
            last = features
        assert last.grid == anchor.geometry(anchor.img_size)[-1].grid
        last.data.square().mean().backward()
        gradients.append([p.grad for p in anchor.parameters() if p.grad is not None])
        buffers.append(list(anchor.buffers()))
    assert gradients[0] and all(map(torch.equal, *gradients)) and all(map(torch.equal, *buffers))
    assert family in ("swin", "convnext", "pvt") or not all(map(torch.equal, buffers[0], start.buffers()))


@pytest.mark.parametrize("pair", [("swin", "swin"), ("resnet", "convnext"), ("pvt", "swin")])
def test_least_squares_is_torchs_over_the_same_rows(pair: tuple[str, str]) -> None:
    """Between layouts, too: NCHW to NHWC, tokens to NHWC."""
    anchors = [make(family, classifier=False) for family in pair]
    if pair[0] == pair[1]:
        anchors[1] = make(pair[1], classifier=False, embed_dim=24, depths=(2, 2, 4, 2))
    network = StitchedNetwork(anchors, StitchSpace.two_way([anchor.stages for anchor in anchors]), rank=0)
    batches = [images(anchors[0], 16) for _ in range(2)]
    equations = NormalEquations(network)
    for batch in batches:
        equations.add(batch)
    equations.solve()
    with torch.no_grad():
        rows = [
            [torch.cat(parts).double() for parts in zip(*outputs, strict=True)]
            for outputs in (
                [[features.rows() for _, features in anchor.run(anchor.stem(batch))] for batch in batches]
                for anchor in anchors
            )
        ]
    for key in list(network.space.layers)[::3]:
        x, y = rows[key.source][key.source_block], rows[key.target][key.target_block - 1]
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        residual = (x @ torch.linalg.lstsq(x, y, driver="gelsd").solution - y).square().sum()
        layer = network.layer(key)
        own = (x[:, :-1] @ layer.weight.double().T + layer.bias.double() - y).square().sum()
        assert own <= residual * 1.01 + 1e-6 * y.square().sum()  # weights are stored as float32


def test_a_shared_layer_is_solved_for_all_its_crossings() -> None:
    """In the sliding window of plain ViTs, where some enter before the first block."""
    anchors = [
        create_anchor("deit_tiny_patch16_224", 32, embed_dim=width, depth=3, num_heads=2).eval() for width in (16, 24)
    ]
    space = StitchSpace.sliding_window([anchor.stages for anchor in anchors])
    network = StitchedNetwork(anchors, space, rank=0)
    x = torch.randn(8, 3, 32, 32)
    equations = NormalEquations(network)
    equations.add(x)
    equations.solve()
    with torch.no_grad():
        outputs = [[a.stem(x).rows().double()] for a in anchors]
        for anchor, found in zip(anchors, outputs, strict=True):
            found += [features.rows().double() for _, features in anchor.run(anchor.stem(x))]
    for window, key in enumerate(space.layers):
        pairs = [(j, k) for j in (window, window + 1) for k in (window, window + 1)]
        pairs = pairs if window == 0 else pairs[1:]
        a = torch.cat([outputs[0][j + 1] for j, _ in pairs])  # after block j
        b = torch.cat([outputs[1][k] for _, k in pairs])  # before block k
        a = torch.cat([a, torch.ones(len(a), 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(a, b, driver="gelsd").solution
        layer = network.layer(key)
        torch.testing.assert_close(layer.weight.double(), solution[:-1].T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.bias.double(), solution[-1], rtol=1e-3, atol=1e-4)


def test_a_shared_layer_of_a_stage_is_solved_for_all_its_crossings() -> None:
    """Of two blocks to four, in the published order: after block 0 or 1 for a layer, after block 1 for the other."""
    anchors = [
        make("resnet", classifier=False, layers=(1, blocks, 1, 1), channels=channels)
        for blocks, channels in ((2, (8, 12, 16, 20)), (4, (16, 24, 32, 40)))
    ]
    space = StitchSpace.sliding_window([anchor.stages for anchor in anchors], skip=(0, 2, 3))
    network = StitchedNetwork(anchors, space, rank=0)
    x = images(anchors[0], 4)
    equations = NormalEquations(network)
    equations.add(x)
    equations.solve()
    with torch.no_grad():
        small, large = (
            [features.data.movedim(1, -1).flatten(0, 2).double() for _, features in anchor.run(anchor.stem(x))]
            for anchor in anchors
        )
    for key, pairs in zip(space.layers, [[(0, 1), (1, 2)], [(1, 3)]], strict=True):
        # Block 0 of the stage is the second one of its anchor; what enters block k leaves the block before.
        a = torch.cat([small[1 + j] for j, _ in pairs])
        b = torch.cat([large[k] for _, k in pairs])
        a = torch.cat([a, torch.ones(len(a), 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(a, b, driver="gelsd").solution
        layer = network.layer(key)
        torch.testing.assert_close(layer.weight.double(), solution[:-1].T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.bias.double(), solution[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "figure"), [*((family, "flops") for family in SKIPPED), ("deit_ti_s_b", "flops_with_final_norm")]
)
def test_flops_of_all_published_routes(family: str, figure: str) -> None:
    """SN-Net's own figures, to the last multiply-accumulate. Its crossing routes through plain ViTs skip the norm."""
    published = json.loads((PUBLISHED / f"v1_{family}.json").read_text())
    with torch.device("meta"):
        anchors = [create_anchor(anchor["timm"], 224, classifier=True) for anchor in published["anchors"]]
        skips = family == "deit_ti_s_b" and figure == "flops"
        space = StitchSpace.sliding_window([anchor.stages for anchor in anchors], SKIPPED[family], skips)
        network = StitchedNetwork(anchors, space, rank=0)
    costs = cost_model(network, (224, 224)).stitches(None)
    for stitch, entry in zip(space, published["stitches"], strict=True):
        assert costs[stitch.id].flops == entry.get(figure, entry["flops"])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_number_of_classes_leave_the_classifier_out(family: str, tmp_path: Path) -> None:
    saved = make(family).model.state_dict()
    torch.save(saved, tmp_path / "w.pth")
    for other in (make(family), make(family, num_classes=7), make(family, classifier=False)):
        before = {name: value.clone() for name, value in other.model.state_dict().items()}
        report = load_pretrained(other, tmp_path / "w.pth")
        for name, value in other.model.state_dict().items():
            fits = saved[name].shape == value.shape
            assert torch.equal(value, saved[name] if fits else before[name]) and (name in report.kept) != fits


@torch.no_grad()
@pytest.mark.parametrize("family", ["swin", "resnet", "levit"])
def test_kept_blocks_give_the_same(family: str) -> None:
    anchor = make(family)
    x = images(anchor)
    outputs = [features.data for _, features in anchor.run(anchor.stem(x))]
    geometry, cut = anchor.geometry(anchor.img_size), anchor.stages[0]
    kept = copy.deepcopy(anchor)
    kept.keep([STEM, *(Component("block", block) for block in range(cut))])
    assert CLASSIFIER not in kept.components and kept.stages == anchor.stages
    assert [g.data.shape for g in kept.geometry(anchor.img_size)] == [g.data.shape for g in geometry]
    assert torch.equal(list(kept.run(kept.stem(x), 0, cut))[-1][1].data, outputs[cut - 1])


def test_sizes_that_are_no_whole_patches() -> None:
    """Swin pads to patches, at the bottom and on the right; ResNets take any size."""
    swin, resnet = make("swin"), make("resnet")
    x = torch.randn(1, 3, 62, 91)
    assert swin.padded_size((62, 91)) == (64, 92) and resnet.padded_size((62, 91)) == (62, 91)
    with torch.no_grad():
        padded = torch.nn.functional.pad(x, (0, 1, 0, 2))
        assert torch.equal(swin.stem(x).data, swin.stem(padded).data)
        assert torch.equal(list(resnet.run(resnet.stem(x)))[-1][1].map(), resnet.model.forward_features(x))


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("gcvit_tiny", {}, "query that is made from the input of the whole stage"),
        ("efficientformer_l1", {}, "layout of its features changes"),
        ("vgg11", {}, "swin_.*convnext_.*resnet"),
        ("swin_tiny_patch4_window7_224", dict(rel_pos_bias=True), "plain ViTs"),
        ("resnet18", dict(depth=3), "unknown key 'depth'"),
    ],
)
def test_what_is_no_anchor(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        create_anchor(name, 64, **settings)


def test_every_adapter_has_a_family() -> None:
    from mmsnnet.stitching.anchors.staged import ADAPTERS

    names = [name for name, _, _ in FAMILIES.values()]
    assert {timm.model_entrypoint(name).__module__ for name in names} == {
        adapter.model_class.__module__ for adapter in ADAPTERS
    }
