"""The stitched classifier: logits of every route, its loss, what it mixes, and what it refuses."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmsnnet.models import StitchedClassifier, find_stitched_backbone, model_costs
from mmsnnet.registry import MODELS

WIDTHS, DEPTHS, CLASSES = (32, 48), (2, 4), 6
BACKBONE = dict(
    type="mmsnnet.StitchedViT",
    anchors=[
        dict(model="vit_tiny_patch16_224", patch_size=8, embed_dim=width, depth=depth, num_heads=2)
        for width, depth in zip(WIDTHS, DEPTHS, strict=True)
    ],
    img_size=32,
    rank=2,
    flops_step=1e5,
)


def classifier(**settings: Any) -> StitchedClassifier:
    """A small one with weights of its own, ready to train."""
    torch.manual_seed(0)
    model = MODELS.build(dict(type="mmsnnet.StitchedClassifier", backbone=BACKBONE, num_classes=CLASSES) | settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    network = model.backbone.network
    for key in network.space.layers:
        network.layer(key).initialized = True
    return model


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def samples(*labels: int, **meta: Any) -> list[BaseDataElement]:
    return [BaseDataElement(gt_label=label, metainfo=meta) for label in labels]


@torch.no_grad()
def test_every_route_ends_in_the_norm_and_head_of_the_anchor_that_it_ends_in() -> None:
    model = classifier().eval()
    backbone = find_stitched_backbone(model)
    for stitch in backbone.space:
        backbone.set_stitch(stitch)
        tokens: list[Tensor] = []
        last = backbone.network.anchor(stitch.segments[-1].anchor).model
        handle = last.norm.register_forward_hook(lambda module, inputs, output, seen=tokens: seen.append(output))
        logits = model(images(), mode="tensor")
        handle.remove()
        assert logits.shape == (4, CLASSES)
        # The class token through the head, by hand.
        expected = tokens[0][:, 0] @ last.head.weight.T + last.head.bias
        torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_an_anchor_as_a_route_is_timm_s_classifier() -> None:
    model = classifier().eval()
    for index in (0, 1):
        model.backbone.set_stitch(index)
        torch.testing.assert_close(model(images()), model.backbone.network.anchor(index).model(images()))


@torch.no_grad()
def test_predict_gives_logits_and_the_label_of_the_highest_beside_what_was_there() -> None:
    model = classifier().eval()
    given = samples(3, 1, 0, 2, img_path="a.jpg")
    found = model(images(), given, mode="predict")
    logits = model(images())
    assert [sample.gt_label for sample in found] == [3, 1, 0, 2] and found[0].img_path == "a.jpg"
    for sample, row in zip(found, logits, strict=True):
        assert torch.equal(sample.logits, row)
        assert int(sample.pred_label) == max(range(CLASSES), key=lambda label: float(row[label]))
    assert torch.equal(torch.stack([s.logits for s in model(images(), mode="predict")]), logits)


def logits_of_drawn(model: StitchedClassifier, inputs: Tensor) -> Tensor:
    """The logits of the stitch that training has just drawn."""
    model.backbone.set_stitch(model.backbone.drawn)
    model.eval()
    with torch.no_grad():
        return model(inputs)


def test_the_loss_without_mixing_is_the_cross_entropy_of_the_stitch_drawn() -> None:
    model = classifier().train()
    labels = [5, 0, 2]
    loss = model(images(3), samples(*labels), mode="loss")["loss"]
    rows = logits_of_drawn(model, images(3)).tolist()
    expected = sum(
        math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in zip(rows, labels, strict=True)
    )
    assert loss.item() == pytest.approx(expected / 3, rel=1e-5)


def test_label_smoothing_alone_spreads_the_target() -> None:
    model = classifier(mixing=dict(prob=0.0, label_smoothing=0.3)).train()
    labels = [5, 0]
    loss = model(images(2), samples(*labels), mode="loss")["loss"]
    rows = torch.log_softmax(logits_of_drawn(model, images(2)).double(), dim=1).tolist()
    expected = -sum(0.7 * row[label] + 0.3 * sum(row) / CLASSES for row, label in zip(rows, labels, strict=True))
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)


CUTMIX = dict(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.0)


def mixed(model: StitchedClassifier, count: int = 4) -> tuple[Tensor, Tensor]:
    """The images that the backbone sees in a training step, and the loss."""
    seen: list[Tensor] = []
    handle = model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    loss = model(images(count), samples(*range(count)), mode="loss")["loss"]
    handle.remove()
    return seen[0], loss


def test_cutmix_pastes_a_box_of_the_mirrored_batch_and_shares_the_target_out_by_its_area() -> None:
    model = classifier(mixing=CUTMIX).train()
    found, loss = mixed(model)
    plain = images()
    changed = found != plain
    assert 0 < changed.float().mean() < 1
    assert torch.equal(found[changed], plain.flip(0)[changed])
    # The same box in each image and channel, and the target by what is left of the image outside of it.
    assert torch.equal(changed, changed[:1, :1].expand_as(changed))
    rows = torch.nonzero(changed[0, 0])
    sides = rows.max(dim=0).values - rows.min(dim=0).values + 1
    share = 1 - float(sides.prod()) / 32**2
    log_probabilities = torch.log_softmax(logits_of_drawn(model, found), dim=1)
    expected = -sum(
        share * log_probabilities[index, index] + (1 - share) * log_probabilities[index, 3 - index]
        for index in range(4)
    )
    assert loss.item() == pytest.approx(float(expected) / 4, rel=1e-5)


def test_what_is_mixed_follows_from_the_number_of_draws_and_leaves_numpy_alone() -> None:
    np.random.seed(7)
    state = np.random.get_state()
    one = classifier(mixing=CUTMIX).train()
    first, second, third = (mixed(one)[0] for _ in range(3))
    after = np.random.get_state()
    assert all(np.array_equal(x, y) for x, y in zip(state, after, strict=True))
    assert not torch.equal(first, second)
    np.random.seed(8)
    resumed = classifier(mixing=CUTMIX).train()
    resumed.load_state_dict(one.state_dict())
    resumed.backbone.draws = 2
    assert torch.equal(mixed(resumed)[0], third)


def test_ranks_mix_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in (0, 1):
        monkeypatch.setattr("mmengine.dist.get_rank", lambda rank=rank: rank)
        found.append(mixed(classifier(mixing=CUTMIX).train())[0])
    assert not torch.equal(*found)


def erased(model: StitchedClassifier, count: int = 64, noise: int = 3) -> tuple[Tensor, Tensor]:
    """The images that the backbone sees in a training step, and which of their values are not the input's."""
    seen: list[Tensor] = []
    handle = model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    torch.manual_seed(noise)
    model(images(count), samples(*[0] * count), mode="loss")
    handle.remove()
    return seen[0], seen[0] != images(count)


def test_erasing_fills_a_box_of_some_images_with_normal_values() -> None:
    found, changed = erased(classifier(erasing=dict(probability=0.5, mode="pixel")).train())
    hit = changed.flatten(1).any(1)
    assert 0.25 < hit.float().mean() < 0.75
    for image in changed[hit]:
        rows, columns = image.any(0).any(1).nonzero(), image.any(0).any(0).nonzero()
        box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all() and box.sum() == image.sum() and 0.01 < box[0].numel() / 32**2 < 0.4
    values = found[changed]
    assert len(values) > 1000 and abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1


def test_erasing_may_spare_the_first_half_and_comes_before_mixing() -> None:
    _, changed = erased(classifier(erasing=dict(probability=1.0, mode="const", num_splits=2)).train(), 8)
    assert changed.flatten(1).any(1).tolist() == [False] * 4 + [True] * 4
    # Mixup at a fixed share: what was erased to 0 shows in the image's own share and in that of its partner.
    both = classifier(
        erasing=dict(probability=1.0, mode="const"), mixing=dict(mixup_alpha=1.0, cutmix_alpha=0.0)
    ).train()
    alone = classifier(mixing=dict(mixup_alpha=1.0, cutmix_alpha=0.0)).train()
    differs = (erased(both, 2)[0] - erased(alone, 2)[0]).abs() > 1e-6
    assert torch.equal(differs[0], differs[1]) and differs[0].any() and not differs[0].all()


def test_what_is_erased_follows_from_the_number_of_draws_and_leaves_python_alone() -> None:
    settings = dict(erasing=dict(probability=0.5, mode="pixel"))
    random.seed(7)
    state = random.getstate()
    one = classifier(**settings).train()
    first, second, third = (erased(one)[1] for _ in range(3))
    assert random.getstate() == state and not torch.equal(first, second)
    resumed = classifier(**settings).train()
    resumed.backbone.draws = 2
    assert torch.equal(erased(resumed)[1], third)
    again = classifier(**settings).train()
    values = [erased(again, noise=noise)[0] for noise in (3, 4)]
    assert not torch.equal(*values)
    again.backbone.draws = 0
    assert torch.equal(values[0], erased(again, noise=5)[0])  # whatever torch's generator did before
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again(images(2), samples(0, 0), mode="loss")
    assert torch.equal(torch.get_rng_state(), before)


def test_all_stitches_of_a_step_see_what_was_erased_once() -> None:
    model = classifier(erasing=dict(probability=1.0, mode="pixel"), mixing=CUTMIX).train()
    model.backbone.stitches_per_step = 2
    first, second, third = (erased(model, 4)[0] for _ in range(3))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_ranks_erase_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in (0, 1):
        monkeypatch.setattr("mmengine.dist.get_rank", lambda rank=rank: rank)
        found.append(erased(classifier(erasing=dict(probability=0.5)).train())[1])
    assert not torch.equal(*found)


def test_evaluation_erases_nothing() -> None:
    model, plain = classifier(erasing=dict(probability=1.0)).eval(), classifier().eval()
    with torch.no_grad():
        pairs = zip(model(images(), mode="predict"), plain(images(), mode="predict"), strict=True)
        assert all(torch.equal(one.logits, other.logits) for one, other in pairs)


def test_training_reaches_every_head() -> None:
    model = classifier(mixing=CUTMIX).train()
    for _ in range(20):
        model(images(), samples(0, 1, 2, 3), mode="loss")["loss"].backward()
    assert all(model.backbone.network.anchor(index).model.head.weight.grad.abs().sum() > 0 for index in (0, 1))


def test_the_costs_are_the_backbone_s_heads_included() -> None:
    model = classifier()
    costs = model_costs(model)
    assert costs == model.backbone.costs()
    tokens = 17
    for index, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        block = tokens * 12 * width**2 + 2 * tokens**2 * width
        norms = (2 * depth * tokens + tokens) * width * 5
        assert costs[index].flops == 16 * 3 * 64 * width + depth * block + norms + width * CLASSES


def test_the_backbone_s_config_is_that_of_any_toolbox() -> None:
    given = dict(BACKBONE)
    classifier()
    assert given == BACKBONE and "num_classes" not in BACKBONE


@pytest.mark.parametrize("mode", ["loss", "predict"])
def test_a_data_set_of_other_classes_is_refused(mode: str) -> None:
    model = classifier().train(mode == "loss")
    with pytest.raises(ValueError, match=rf"has 10 classes \(x/a\.jpg .*the model {CLASSES}: set model\.num_classes"):
        model(images(2), samples(0, 1, num_classes=10, img_path="x/a.jpg"), mode=mode)
    assert model(images(2), samples(0, 1, num_classes=CLASSES), mode=mode) is not None


def test_an_odd_batch_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match=r"even size, got 3 images.*drop_last"):
        classifier(mixing=CUTMIX).train()(images(3), samples(0, 1, 2), mode="loss")


def test_mixing_that_mixes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mixup_alpha or cutmix_alpha above 0, or prob=0\.0"):
        classifier(mixing=dict(mixup_alpha=0.0, label_smoothing=0.1))


@pytest.mark.parametrize("erasing", [dict(mode="pixels"), dict(probability=1.5), dict(probability=-0.1)])
def test_erasing_that_timm_does_not_know_is_refused(erasing: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="erasing needs mode const, rand or pixel, and a probability from 0 to 1"):
        classifier(erasing=erasing)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'loss', 'predict' or 'tensor', got 'logits'"):
        classifier()(images(), mode="logits")
