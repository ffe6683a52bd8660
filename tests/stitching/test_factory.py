"""A stitched network in one line."""

from pathlib import Path

import pytest
import torch

from mmsnnet.stitching import StitchSpace, create_anchor, create_stitched

TINY = dict(num_heads=2, embed_dim=32)
MODELS = ("deit3_small_patch16_224", "deit3_base_patch16_224")


def test_the_network_runs_every_stitch() -> None:
    network = create_stitched(*MODELS, img_size=32, rank=2, depth=4, **TINY).eval()
    assert network.space == StitchSpace.two_way((4, 4)) and not network.initialized
    with torch.no_grad():
        for stitch in network.space:
            (features,) = network(torch.randn(1, 3, 32, 32), stitch, (3,))
            assert features.shape == (1, 32, 2, 2)


@pytest.mark.parametrize("batches", [False, True])
def test_layers_are_solved_from_images(batches: bool) -> None:
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = create_stitched(
        *MODELS, img_size=32, init_from=images.split(16) if batches else images, rank=2, depth=2, **TINY
    ).eval()
    assert network.initialized
    # A layer maps what leaves its source closer to its target than any constant does.
    with torch.no_grad():
        left = [[f.rows() for _, f in anchor.run(anchor.stem(images))] for anchor in network.anchors]
        key = network.space.layers[0]
        source, target = left[key.source][key.source_block], left[key.target][key.target_block - 1]
        residual = (network.layer(key)(source) - target).square().mean()
        assert residual < 0.9 * (target - target.mean(0)).square().mean()


def test_one_way_classifier_from_files(tmp_path: Path) -> None:
    settings = dict(img_size=32, depth=2, classifier=True, num_classes=3, **TINY)
    anchors = [create_anchor(model, **settings) for model in MODELS]
    paths = [str(tmp_path / f"{index}.pth") for index in (0, 1)]
    for anchor, path in zip(anchors, paths, strict=True):
        torch.save(anchor.model.state_dict(), path)
    network = create_stitched(*MODELS, pretrained=paths, scheme="one_way", **settings).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for anchor, stitch in zip(anchors, network.space.anchors, strict=True):
            torch.testing.assert_close(network.classify(images, stitch), anchor.eval().model(images))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"one source for each of 2 models; got \['a.pth'\]"):
        create_stitched(*MODELS, img_size=32, pretrained=["a.pth"], depth=2, **TINY)
    with pytest.raises(ValueError, match="scheme is one of two_way, one_way, sliding_window; got 'both'"):
        create_stitched(*MODELS, img_size=32, scheme="both", depth=2, **TINY)


@pytest.mark.parametrize(
    "images, got",
    [
        (torch.zeros(3, 32, 32), r"torch.float32 \(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"torch.uint8 \(2, 3, 32, 32\)"),
        ([torch.zeros(3, 32, 32)] * 2, r"torch.float32 \(3, 32, 32\)"),
        ([(torch.zeros(2, 3, 32, 32), torch.zeros(2))], "tuple"),
    ],
    ids=["one image", "bytes", "list of images", "images with labels"],
)
def test_what_are_no_batches_of_normalised_images(images: object, got: str) -> None:
    with pytest.raises(ValueError, match=rf"normalised images as tensors \(B, C, H, W\) .* got {got}"):
        create_stitched(*MODELS, img_size=32, init_from=images, depth=2, **TINY)
