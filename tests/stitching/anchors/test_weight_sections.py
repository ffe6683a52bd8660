"""Places of weights in users' files: in dicts, below prefixes, beside other models."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mmsnnet.errors import DataError, SettingError
from mmsnnet.stitching import Anchor, LoadReport, StitchedNetwork, StitchSpace, create_anchor, load_pretrained
from mmsnnet.stitching.anchors.weight_sections import MOST_DICTS, MOST_PREFIXES, find_sections

Weights = dict[str, Tensor]

SIZES = dict(embed_dim=32, depth=2, num_heads=2)


@pytest.fixture
def weights(make_anchor: Callable[..., Anchor]) -> Weights:
    """Weights of a model without a classifier, under timm's names."""
    return make_anchor(model="vit_tiny_patch16_224").model.state_dict()


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def other(weights: Weights) -> Weights:
    """The weights of another training run of the same model."""
    return {name: tensor + 1 for name, tensor in weights.items()}


def load(file: Any, folder: Path, prefix: str | None = None) -> tuple[Anchor, LoadReport]:
    """Load a file into a new anchor."""
    anchor = create_anchor("vit_tiny_patch16_224", 32, **SIZES)
    torch.save(file, folder / "w.pth")
    return anchor, load_pretrained(anchor, folder / "w.pth", prefix=prefix)


def has(module: nn.Module, weights: Weights) -> bool:
    state = module.state_dict()
    return bool(state) and all(torch.equal(state[name], weights[name]) for name in state)


DINO_HEAD = {"dino_head.mlp.0.weight": torch.zeros(4, 4), "dino_head.last_layer.weight": torch.zeros(8, 4)}
PLACES: dict[str, tuple[Callable[[Weights], Any], tuple[str, ...]]] = {
    "bare": (lambda w: w, ()),
    "a self-supervised run": (lambda w: {"teacher": prefixed(w, "backbone.") | DINO_HEAD}, ("teacher", "backbone.")),
    "Lightning": (lambda w: {"state_dict": prefixed(w, "model.")}, ("state_dict", "model.")),
    "mmpretrain": (
        lambda w: {"meta": {}, "state_dict": prefixed(w, "backbone.") | {"head.fc.weight": torch.zeros(5, 32)}},
        ("state_dict", "backbone."),
    ),
    "DataParallel": (lambda w: {"net": prefixed(w, "module.")}, ("net", "module.")),
    "torch.compile": (lambda w: prefixed(w, "_orig_mod."), ()),
    "torch.compile in DDP": (lambda w: {"model": prefixed(w, "module._orig_mod.")}, ("model", "module.")),
    "DDP in torch.compile": (lambda w: {"model": prefixed(w, "_orig_mod.module.")}, ("model", "module.")),
    "blocks compiled one by one": (
        lambda w: {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): tensor for name, tensor in w.items()},
        (),
    ),
    "FSDP": (
        lambda w: {re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", name): tensor for name, tensor in w.items()},
        (),
    ),
    "an encoder": (lambda w: {"network": prefixed(w, "encoder.")}, ("network", "encoder.")),
    "a CLIP-like tower": (lambda w: prefixed(w, "visual."), ("visual.",)),
    "a prefix of three": (lambda w: prefixed(w, "model_ema.module.vit."), ("model_ema.module.vit.",)),
    "dicts of three": (lambda w: {"a": {"b": {"c": w}}}, ("a", "b", "c")),
    "no name of a wrapper": (lambda w: {"whatever": prefixed(w, "my.own.")}, ("whatever", "my.own.")),
    "beside an optimizer": (
        lambda w: {
            "epoch": 3,
            "student_params": w,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        },
        ("student_params",),
    ),
    "beside an optimizer with names": (
        lambda w: {"net": w, "optim": {"state": {name: {"exp_avg": tensor} for name, tensor in w.items()}}},
        ("net",),
    ),
    "beside a convolutional network": (
        lambda w: prefixed(w, "vit.") | {f"cnn.{i}.conv.weight": torch.zeros(4, 4, 3, 3) for i in range(9)},
        ("vit.",),
    ),
    "twice the same": (lambda w: {"model": w, "model_ema": {k: v.clone() for k, v in w.items()}}, ("model",)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_holds_the_whole_model_is_seen_through(place: str, weights: Weights, tmp_path: Path) -> None:
    wrap, under = PLACES[place]
    anchor, report = load(wrap(weights), tmp_path)
    assert has(anchor.model, weights)
    assert report.under == under
    assert report.loaded == len(anchor.model.state_dict()) and not report.resized and not report.kept
    text = f", under {' and '.join(map(repr, under))}" if under else ""
    assert str(report).startswith(f"{tmp_path / 'w.pth'}: {report.loaded} tensors loaded{text}")


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict_ema", "ema"])
@pytest.mark.parametrize("prefix", ["backbone.", "student.", "teacher.backbone.", "ema_model.module."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_wrappers_and_prefixes_go_together(
    wrapper: str | None, prefix: str, suffix: str, weights: Weights, tmp_path: Path
) -> None:
    anchor = create_anchor("vit_tiny_patch16_224", 32, **SIZES)
    path, named = tmp_path / f"w{suffix}", prefixed(weights, prefix)
    if suffix == ".safetensors":
        safetensors.torch.save_file(prefixed(named, f"{wrapper}." if wrapper else ""), path)
        under: tuple[str, ...] = (f"{wrapper}.{prefix}" if wrapper else prefix,)
    else:
        torch.save({wrapper: named} if wrapper else named, path)
        under = (wrapper, prefix) if wrapper else (prefix,)
    assert load_pretrained(anchor, path).under == under
    assert has(anchor.model, weights)


SEVERAL: dict[str, tuple[Callable[[Weights], Any], tuple[str, str]]] = {
    "student and teacher": (
        lambda w: {"student": prefixed(w, "module.backbone."), "teacher": prefixed(other(w), "backbone.") | DINO_HEAD},
        ("student.module.backbone.", "teacher.backbone."),
    ),
    "student and teacher below one dict": (
        lambda w: {"model": prefixed(w, "student.backbone.") | prefixed(other(w), "teacher.backbone.")},
        ("model.student.backbone.", "model.teacher.backbone."),
    ),
    "model and EMA": (
        lambda w: {"model": w, "model_ema": prefixed(other(w), "module.")},
        ("model.", "model_ema.module."),
    ),
    "timm's": (lambda w: {"state_dict": w, "state_dict_ema": other(w)}, ("state_dict.", "state_dict_ema.")),
    "mmengine's": (
        lambda w: {
            "state_dict": prefixed(w, "backbone."),
            "ema_state_dict": prefixed(other(w), "module.backbone.") | {"steps": torch.tensor(3)},
        },
        ("state_dict.backbone.", "ema_state_dict.module.backbone."),
    ),
    "I-JEPA": (
        lambda w: {"encoder": prefixed(w, "module."), "target_encoder": prefixed(other(w), "module.")},
        ("encoder.module.", "target_encoder.module."),
    ),
    "one without a prefix": (lambda w: w | prefixed(other(w), "ema."), ("", "ema.")),
    "a model within the other": (
        lambda w: prefixed(w, "net.") | prefixed(other(w), "net.momentum.encoder."),
        ("net.", "net.momentum.encoder."),
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_a_choice_is_asked_for_and_taken(case: str, weights: Weights, tmp_path: Path) -> None:
    wrap, addresses = SEVERAL[case]
    with pytest.raises(SettingError, match="holds the model more than once, with different weights") as caught:
        load(wrap(weights), tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "w.pth") in message and "\n" not in message
    assert all(f"{address!r}" in message for address in addresses)
    assert "pretrained=dict(source=..., prefix=" in message
    for address, expected in zip(addresses, (weights, other(weights)), strict=True):
        anchor, report = load(wrap(weights), tmp_path, prefix=address)
        assert has(anchor.model, expected), address
        assert "".join(f"{part}." for part in report.under[:-1]) in address


@pytest.mark.parametrize("prefix", ["teacher", "teacher.", "teacher.backbone", "teacher.backbone."])
def test_a_part_of_an_address_is_enough(prefix: str, weights: Weights, tmp_path: Path) -> None:
    file = SEVERAL["student and teacher"][0](weights)
    for wrapped in (file, {"checkpoint": file}):
        anchor, report = load(wrapped, tmp_path, prefix=prefix)
        assert has(anchor.model, other(weights)) and report.under[-2:] == ("teacher", "backbone.")
    with pytest.raises(SettingError, match="more than once"):
        load(file, tmp_path, prefix="backbone")


@pytest.mark.parametrize("prefix", ["teach", "eacher.", "nowhere", "dino_head.", "teacher.backbone.blocks."])
def test_a_prefix_that_chooses_nothing(prefix: str, weights: Weights, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no model under prefix='.*'; .* 'teacher\.', 'teacher\.backbone\.'"):
        load({"teacher": prefixed(weights, "backbone.") | DINO_HEAD}, tmp_path, prefix=prefix)


def test_many_copies_are_not_all_listed(weights: Weights, tmp_path: Path) -> None:
    file = {f"m{index}": {name: tensor + index for name, tensor in weights.items()} for index in range(30)}
    with pytest.raises(SettingError, match=r"'m0\.', 'm1\.', 'm2\.', 'm3\.', 'm4\.' and 1 more"):
        load(file, tmp_path)
    assert has(load(file, tmp_path, prefix="m29")[0].model, file["m29"])


def test_an_anchor_out_of_a_stitched_network(make_network: Callable[..., StitchedNetwork], tmp_path: Path) -> None:
    """A checkpoint of two anchors needs a prefix; the anchor of a checkpoint of one is loaded below any wrapper."""
    network = make_network(depths=(2, 2), widths=(32, 32), model="vit_tiny_patch16_224")
    file = {"state_dict": prefixed(network.state_dict(), "backbone.network.")}
    with pytest.raises(DataError, match=r"holds 2 anchors.*prefix='anchors\.0\.'"):
        load(file, tmp_path)
    for index in range(2):
        anchor, _ = load(file, tmp_path, prefix=f"anchors.{index}.")
        assert has(anchor.model, network.anchor(index).model.state_dict())
    single = StitchedNetwork([network.anchor(1)], StitchSpace.single(2))
    anchor, report = load({"net": prefixed(single.state_dict(), "module.model.backbone.network.")}, tmp_path)
    assert has(anchor.model, network.anchor(1).model.state_dict())
    assert report.under == ("net", "module.model.backbone.network.anchors.0.model.")


def test_the_state_dict_of_an_anchor_has_its_grid(make_anchor: Callable[..., Anchor], tmp_path: Path) -> None:
    """96 x 64 and 64 x 96 pixels have as many patches: only the recorded grid distinguishes them."""
    source, target = (make_anchor(img_size=size) for size in ((96, 64), (64, 96)))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert load_pretrained(target, tmp_path / "w.pth").resized == ("pos_embed",)
    assert not torch.equal(target.model.pos_embed, source.model.pos_embed)


# What does not fit


@pytest.mark.parametrize("prefix", ["", "model.", "a.b.c."])
@pytest.mark.parametrize("dicts", [(), ("net",), ("a", "b")])
def test_names_of_nobody(prefix: str, dicts: tuple[str, ...], weights: Weights, tmp_path: Path) -> None:
    """The message names the common prefix of all keys instead of listing the keys."""
    unknown = {name.replace("blocks", "trunk_layer").replace("_", "-") + "X": one for name, one in weights.items()}
    file: Any = prefixed(unknown, prefix)
    for key in reversed(dicts):
        file = {key: file}
    with pytest.raises(DataError, match="no name that is known") as caught:
        load(file, tmp_path)
    message, address = str(caught.value), "".join(f"{key}." for key in dicts) + prefix
    assert (f"all begin with {address!r}" in message) == bool(prefix)
    assert "cls-tokenX" in message and "cls_token" in message and "docs/checkpoints.md" in message
    assert len(message) < 900 and "\n" not in message


@pytest.mark.parametrize("depth", [1, 3, 30])
def test_another_depth_below_a_prefix(depth: int, make_anchor: Callable[..., Anchor], tmp_path: Path) -> None:
    """The keys of the model below the prefix are compared, not all of the file's; a few are listed."""
    deeper = make_anchor(depth, model="vit_tiny_patch16_224").model.state_dict()
    with pytest.raises(DataError, match=r"\(under 'teacher\.backbone\.'\) does not fit .*2 blocks, width 32") as caught:
        load({"teacher": prefixed(deeper, "backbone.") | DINO_HEAD}, tmp_path)
    message = str(caught.value)
    assert re.search(r"missing: blocks\.1\." if depth == 1 else r"left over: blocks\.2\.norm1\.weight \(32,\)", message)
    assert message.count("blocks.") <= 5 and len(message) < 700


def test_a_model_in_pieces_is_not_whole(weights: Weights, tmp_path: Path) -> None:
    first = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.1")}
    second = {name: tensor for name, tensor in weights.items() if name not in first}
    with pytest.raises(DataError, match=r"missing: blocks\.1\.norm1\.weight"):
        load({"a": first, "b": second}, tmp_path)


# Files that are made to take long


def test_dicts_that_share_are_visited_once() -> None:
    """Thirty nested dicts with ten references each: 10^30 paths."""
    shared: dict[str, Any] = {"w": torch.zeros(1)}
    for _ in range(30):
        shared = {f"k{index}": shared for index in range(10)}
    assert find_sections({"state_dict": shared}, least=1) == []


def test_dicts_are_looked_into_so_deep(weights: Weights, tmp_path: Path) -> None:
    file: Any = weights
    for _ in range(MOST_DICTS + 1):
        file = {"a": file}
    with pytest.raises(DataError, match="holds no weights by name"):
        load(file, tmp_path)


def test_prefixes_are_looked_into_so_deep(weights: Weights) -> None:
    deep = "a." * MOST_PREFIXES
    assert [one.prefix for one in find_sections(prefixed(weights, deep), least=2)][-1] == deep
    assert deep + "a." not in [one.prefix for one in find_sections(prefixed(weights, deep + "a."), least=2)]
    long = {"." * 100_000 + str(index): torch.zeros(1, 1, 1, 1) for index in range(20)}
    assert len(find_sections(long, least=2)) == MOST_PREFIXES + 1


def test_what_wrappers_insert_is_kept_where_names_would_be_the_same() -> None:
    both = {"a._orig_mod.w": torch.zeros(1), "a.w": torch.ones(1)}
    assert find_sections(both, least=1)[0].weights.keys() == both.keys()
