"""Anchors: equal to timm's forward, components, freezing, and errors of their creation."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmsnnet.stitching import Anchor, create_anchor
from mmsnnet.stitching.anchors.base import CLASSIFIER, NORM, SHARED, STEM, Component
from mmsnnet.stitching.features import Features, Layout

MakeAnchor = Callable[..., Anchor]

FAMILIES = {
    "deit3": dict(model="deit3_small_patch16_224"),  # class token, layer scale, positions without the class token
    "vit": dict(model="vit_tiny_patch16_224"),  # positions with the class token
    "no class token": dict(model="vit_base_patch16_gap_224"),
    "registers": dict(model="vit_little_patch16_reg4_gap_256"),
    "class token and registers": dict(model="vit_small_patch14_reg4_dinov2", patch_size=16),
    "pre-norm": dict(model="vit_base_patch16_clip_224"),
    "patch 8": dict(model="vit_base_patch8_224"),
    "patch 32": dict(model="vit_small_patch32_224", img_size=64),
    "EVA-02": dict(model="eva02_small_patch14_224", patch_size=16),  # rotary and absolute positions
    "DINOv3": dict(model="vit_small_patch16_dinov3"),  # rotary positions, class token, four registers
    "learned rotations": dict(model="vit_base_patch16_rope_mixed_224"),
    "parallel blocks": dict(model="vit_base_patch16_18x2_224"),
    "rectangular": dict(model="deit3_small_patch16_224", img_size=(32, 64)),
}
SIZES = [(32, 32), (64, 64), (32, 96), (64, 32), (40, 71)]


# Running


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stem_and_blocks_are_timms(
    family: str, size: tuple[int, int], make_anchor: MakeAnchor, make_images: Callable[..., Tensor]
) -> None:
    anchor = make_anchor(depth=2, **FAMILIES[family])
    images = make_images(2, *size)
    has_prefix = anchor.layout().prefix > 0
    _, left = anchor.model.forward_intermediates(images, return_prefix_tokens=has_prefix)
    patches, prefix = zip(*left, strict=True) if has_prefix else (left, [torch.zeros(2, 0, 32)] * 2)
    grid = anchor.grid(size)
    assert grid == tuple(-(-side // patch) for side, patch in zip(size, anchor.patch_size, strict=True))
    for block, features in anchor.run(anchor.stem(images)):
        assert features.grid == grid
        torch.testing.assert_close(features.map(), patches[block])
        torch.testing.assert_close(features.data[:, : anchor.layout().prefix], prefix[block])
        assert features.map().shape == (2, 32, *grid)
        assert features.map().is_contiguous()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_classify_is_timms_forward(family: str, make_anchor: MakeAnchor, make_images: Callable[..., Tensor]) -> None:
    anchor = make_anchor(depth=2, classifier=True, num_classes=5, **FAMILIES[family])
    images = make_images(2, 32, 64)
    *_, (_, features) = anchor.run(anchor.stem(images))
    logits = anchor.classify(features)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(logits, anchor.model(images))


@pytest.mark.parametrize(
    ("family", "patch", "prefix"),
    [
        ("deit3", 16, 1),
        ("no class token", 16, 0),
        ("registers", 16, 4),
        ("class token and registers", 16, 5),
        ("patch 8", 8, 1),
        ("patch 32", 32, 1),
        ("EVA-02", 16, 1),
        ("DINOv3", 16, 5),
    ],
)
def test_what_an_anchor_says_of_itself(family: str, patch: int, prefix: int, make_anchor: MakeAnchor) -> None:
    anchor = make_anchor(depth=3, width=64, **FAMILIES[family])
    assert (anchor.depth, anchor.width, anchor.widths) == (3, 64, (64, 64, 64))
    assert (anchor.patch_size, anchor.layout().prefix) == ((patch, patch), prefix)
    side = FAMILIES[family].get("img_size", 32)
    assert anchor.img_size == (side, side)


def test_recomputing_changes_no_gradient(make_anchor: MakeAnchor) -> None:
    anchor = make_anchor()
    gradients = []
    for recompute in (False, True):
        tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        anchor.zero_grad()
        [(_, left)] = anchor.run(Features(tokens, anchor.layout(), (2, 2)), stop=1, recompute=recompute)
        left.data.square().sum().backward()
        gradients.append([tokens.grad, *(p.grad for p in anchor.model.blocks[0].parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("classifier", [False, True])
def test_parameters_by_their_use(family: str, classifier: bool, make_anchor: MakeAnchor) -> None:
    """Stem, shared parameters, blocks and classifier share out all parameters; the stem depends on its own, and blocks
    on the shared ones."""
    anchor = make_anchor(classifier=classifier, **FAMILIES[family])
    stem, positions = anchor.parameters_of(STEM), anchor.parameters_of(SHARED)
    end = [p for component in (NORM, CLASSIFIER) for p in anchor.parameters_of(component)]
    parts = [stem, positions, list(anchor.model.blocks.parameters()), end]
    assert parts[2] == [p for index in anchor.blocks for p in anchor.parameters_of(Component("block", index))]
    assert (CLASSIFIER in anchor.components) == (NORM in anchor.components) == classifier
    shared_out = [id(p) for part in parts for p in part]
    assert sorted(shared_out) == sorted(id(p) for p in anchor.parameters())
    assert bool(parts[3]) == classifier
    anchor.stem(torch.randn(1, 3, 32, 32)).data.square().sum().backward()
    assert {id(p) for p in stem} == {id(p) for p in anchor.parameters() if p.grad is not None}
    anchor.zero_grad()
    *_, (_, features) = anchor.run(anchor.stem(torch.randn(1, 3, 64, 64)))
    features.data.square().sum().backward()
    assert all(p.grad is not None for p in positions)


# Leaving out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stem", "blocks"), [(True, (0,)), (False, (1,)), (False, (0, 1)), (False, ())])
def test_what_is_kept_is_what_it_was(
    family: str, stem: bool, blocks: tuple[int, ...], make_anchor: MakeAnchor, make_images: Callable[..., Tensor]
) -> None:
    anchor = make_anchor(classifier=True, **FAMILIES[family])
    names = ("depth", "widths", "patch_size", "img_size", "in_chans", "agreement")
    facts = [getattr(anchor, name) for name in names]
    images = make_images(1)
    features = Features(torch.randn(1, anchor.layout().prefix + 4, anchor.width), anchor.layout(), (2, 2))
    shapes = [left.data.shape for left in anchor.geometry((32, 64))]
    before = anchor.state_dict()

    def outputs() -> list[Tensor]:
        outputs = [anchor.stem(images).data] if stem else []
        if blocks:
            outputs += [left.data for _, left in anchor.run(features, blocks[0], blocks[-1] + 1)]
        return outputs

    expected = outputs()
    layout = anchor.layout()
    anchor.keep({Component("block", block) for block in blocks} | ({STEM} if stem else set()))
    assert anchor.layout() == layout
    assert all(torch.equal(a, b) for a, b in zip(outputs(), expected, strict=True))
    assert [getattr(anchor, name) for name in names] == facts
    assert [left.data.shape for left in anchor.geometry((32, 64))] == shapes
    assert (STEM in anchor.components, anchor.blocks, CLASSIFIER in anchor.components) == (stem, blocks, False)
    after = anchor.state_dict()
    assert all(after[name] is not None and torch.equal(after[name], before[name]) for name in after)
    kept = {name.split(".")[2] for name in after if name.startswith("model.blocks.")}
    assert kept == {str(block) for block in blocks}
    assert bool(anchor.parameters_of(STEM)) == stem and anchor.parameters_of(CLASSIFIER) == []
    if not stem and not blocks:
        assert [*anchor.parameters(), *anchor.buffers()] == []


# Freezing


@pytest.mark.parametrize("family", ["deit3", "registers", "pre-norm"])
@pytest.mark.parametrize("blocks", [0, 1, None])
@pytest.mark.parametrize("mode", [True, False])
def test_freeze(family: str, blocks: int | None, mode: bool, make_anchor: MakeAnchor) -> None:
    anchor = make_anchor(depth=3, classifier=True, drop_path_rate=0.1, proj_drop_rate=0.1, **FAMILIES[family])
    anchor.train(mode)
    anchor.freeze(blocks)
    model = anchor.model
    frozen_blocks = 3 if blocks is None else blocks
    for repeat in range(2):
        for index, block in enumerate(model.blocks):
            frozen = index < frozen_blocks
            assert {p.requires_grad for p in block.parameters()} == {not frozen}
            assert {m.training for m in block.modules()} == {mode and not frozen}
        assert not any(p.requires_grad for p in anchor.parameters_of(STEM))
        for module in (model.patch_embed, model.pos_drop, model.norm_pre):
            assert not module.training
        assert {p.requires_grad for p in anchor.parameters_of(CLASSIFIER)} == {blocks is not None}
        assert model.head.training == (mode and blocks is not None)
        mode = not mode
        anchor.train(mode)
        assert repeat or anchor.training == mode


def test_frozen_parts_get_no_gradient(make_anchor: MakeAnchor, make_images: Callable[..., Tensor]) -> None:
    anchor = make_anchor(depth=3)
    anchor.freeze(1)
    *_, (_, features) = anchor.run(anchor.stem(make_images()))
    features.data.sum().backward()
    with_gradient = {name for name, p in anchor.model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        name for name, _ in anchor.model.named_parameters() if name.startswith(("blocks.1", "blocks.2"))
    }


# Making


@pytest.mark.parametrize("name", ["deit3_smal_patch16_224", "deit3_small_patch16_22.fb_in1k"])
def test_unknown_model_with_near_names(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*deit3_small_patch16_224"):
        create_anchor(name, 32)


def test_unknown_model_like_no_other() -> None:
    with pytest.raises(ValueError, match="list_models"):
        create_anchor("@@@", 32)


def test_unknown_key() -> None:
    with pytest.raises(ValueError, match="unknown key 'embed_dims'"):
        create_anchor("deit3_small_patch16_224", 32, embed_dims=64)


@pytest.mark.parametrize("reading", [dict(pretrained=True), dict(checkpoint_path="weights.pth")])
def test_no_weights_are_read(reading: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"leave out .* load_pretrained"):
        create_anchor("deit3_small_patch16_224", 32, **reading)


def test_an_unknown_tag_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"fb_in22k'; there are .*deit3_small_patch16_224\.fb_in22k_ft_in1k"):
        create_anchor("deit3_small_patch16_224.fb_in22k", 32, embed_dim=32, depth=2, num_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "vit_small_r26_s32_224"])
def test_almost_a_plain_vit(name: str) -> None:
    with pytest.raises(TypeError, match="plain ViT"):
        create_anchor(name, 64)


def test_no_classifier(make_anchor: MakeAnchor) -> None:
    anchor = make_anchor()
    with pytest.raises(ValueError, match="classifier=True"):
        anchor.classify(Features(torch.zeros(1, 5, 32), Layout(1, True), (2, 2)))
    assert not any(name.startswith(("norm.", "head", "fc_norm")) for name in anchor.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compile", "export", "trace"])
def test_the_count_of_channels_breaks_no_graph(
    how: str, make_anchor: MakeAnchor, make_images: Callable[..., Tensor]
) -> None:
    """The stem stays one graph, and its trace does not warn of the comparison."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = make_anchor()

        def forward(self, images: Tensor) -> Tensor:
            return self.anchor.stem(images).data

    stem, images = Stem().eval(), make_images(2, 32, 32)
    expected = stem(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*channels.*|.*Python boolean.*base.py")
        if how == "compile":
            other = torch.compile(stem, fullgraph=True, backend="eager")
        elif how == "export":
            batch = torch.export.Dim("batch", min=2, max=8)
            other = torch.export.export(stem, (images,), dynamic_shapes=({0: batch},)).module()
        else:
            other = torch.jit.trace(stem, images)
    torch.testing.assert_close(other(images), expected)
    if how == "compile":
        with pytest.raises(Exception, match="in every anchor, or load images with"):
            other(torch.randn(2, 4, 32, 32))
