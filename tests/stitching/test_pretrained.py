"""The loading of pretrained weights: what is read, resized, left out and refused."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mmsnnet.stitching import Anchor, StitchedNetwork, StitchSpace, create_anchor, load_pretrained
from mmsnnet.stitching.attention import resize_table

MakeAnchor = Callable[..., Anchor]

FAMILIES = {
    "deit3": dict(model="deit3_small_patch16_224"),
    "vit": dict(model="vit_tiny_patch16_224"),
    "no class token": dict(model="vit_base_patch16_gap_224"),
    "registers": dict(model="vit_little_patch16_reg4_gap_256"),
    "class token and registers": dict(model="vit_small_patch14_reg4_dinov2", patch_size=16),
}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class RunsCode:
    """What a hostile checkpoint holds: unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("family", ["deit3", "vit", "registers", "class token and registers", "no class token"])
@pytest.mark.parametrize(("made_at", "size"), [(32, (64, 96)), (64, (32, 48)), (48, 48), (64, (32, 128))])
def test_the_stored_position_embedding_is_resampled(
    family: str, made_at: int, size: int | tuple[int, int], make_anchor: MakeAnchor, tmp_path: Path
) -> None:
    settings = {**FAMILIES[family]}
    source, anchor = make_anchor(img_size=made_at, **settings), make_anchor(img_size=size, **settings)
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))

    grid = (size, size) if isinstance(size, int) else size
    expected = resample_abs_pos_embed(
        source.model.pos_embed,
        [grid[0] // 16, grid[1] // 16],
        old_size=[made_at // 16, made_at // 16],
        num_prefix_tokens=source.model.pos_embed.shape[1] - (made_at // 16) ** 2,
    )
    torch.testing.assert_close(anchor.model.pos_embed, expected)
    assert report.resized == (() if grid == (made_at, made_at) else ("pos_embed",))
    others = [{k: v for k, v in state(a.model).items() if k != "pos_embed"} for a in (source, anchor)]
    assert same(*others)


def test_the_patch_embedding_is_resized(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source = make_anchor()
    anchor = make_anchor(patch_size=8)
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert set(report.resized) == {"patch_embed.proj.weight", "pos_embed"}
    assert "resized" in str(report) and "pos_embed" in str(report)


def deit_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names turned into those of DeiT-III's own files."""
    return {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict", "deit names", "network", "backbone"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_files_may_look_like(wrap: str, suffix: str, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source, anchor = make_anchor(), make_anchor()
    network = StitchedNetwork([source], StitchSpace.single(2))
    weights: dict[str, Any] = {
        "deit names": deit_names(source.model.state_dict()),
        "network": network.state_dict(),
        "backbone": {f"backbone.network.{k}": v for k, v in network.state_dict().items()}
        | {"decode_head.weight": torch.zeros(1)},
    }.get(wrap, source.model.state_dict())
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save({wrap: weights, "epoch": 3} if wrap in ("model", "state_dict") else weights, path)
    report = load_pretrained(anchor, str(path))
    assert same(state(source.model), state(anchor.model))
    assert (report.source, report.loaded) == (str(path), len(source.model.state_dict()))
    assert report.resized == report.left_out == ()


def test_wrapped_deit_checkpoint_as_published(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """DeiT-III's own files: its names under 'model', with a head."""
    source = make_anchor(classifier=True)
    anchor = make_anchor(img_size=(32, 64))
    torch.save({"model": deit_names(source.model.state_dict())}, tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert set(report.left_out) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert report.resized == ("pos_embed",)
    assert torch.equal(anchor.model.blocks[1].ls2.gamma, source.model.blocks[1].ls2.gamma)
    assert "left out" in str(report) and "head.bias" in str(report) and "w.pth" in str(report)


def test_a_classifier_is_loaded_where_it_is_kept(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source, anchor = make_anchor(classifier=True), make_anchor(classifier=True)
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    assert load_pretrained(anchor, str(tmp_path / "w.pth")).left_out == ()
    assert same(state(source.model), state(anchor.model))


def test_a_head_for_other_classes_is_left_out(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source, anchor = make_anchor(classifier=True), make_anchor(classifier=True, num_classes=5)
    head = state(anchor.model.head)
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert set(report.left_out) == set(report.kept) == {"head.weight", "head.bias"}
    assert "kept as initialised: head.weight, head.bias" in str(report)
    assert same(state(anchor.model.head), head) and same(state(anchor.model.norm), state(source.model.norm))


def test_a_bias_that_the_file_lacks_stays_zero(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source = make_anchor()
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    anchor = create_anchor("deit3_small_patch16_224", 64, rel_pos_bias=True, embed_dim=32, depth=2, num_heads=2)
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert report.kept == tuple(f"blocks.{block}.attn.relative_position_bias_table" for block in range(2))
    assert not any(block.attn.relative_position_bias_table.any() for block in anchor.model.blocks)


@pytest.mark.parametrize("one_anchor_checkpoint", [False, True])
def test_a_bias_is_resized_like_the_position_embedding(
    one_anchor_checkpoint: bool, make_anchor: MakeAnchor, tmp_path: Path
) -> None:
    source, anchor = (make_anchor(img_size=size, rel_pos_bias=True) for size in (64, (32, 80)))
    weights = source.model.state_dict()
    if one_anchor_checkpoint:
        weights = StitchedNetwork([source], StitchSpace.single(2)).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    report = load_pretrained(anchor, str(tmp_path / "w.pth"))
    assert report.kept == ()
    for own, other in zip(anchor.model.blocks, source.model.blocks, strict=True):
        expected = resize_table(other.attn.relative_position_bias_table, (4, 4), (2, 5))
        torch.testing.assert_close(own.attn.relative_position_bias_table, expected)


def test_a_bias_of_a_rectangular_grid_is_loaded_at_its_own_size(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source, anchor = (
        make_anchor(img_size=(32, 80), rel_pos_bias=True),
        make_anchor(img_size=(32, 80), rel_pos_bias=True),
    )
    torch.save(StitchedNetwork([source], StitchSpace.single(2)).state_dict(), tmp_path / "w.pth")
    assert load_pretrained(anchor, str(tmp_path / "w.pth")).resized == ()
    assert same(state(source.model), state(anchor.model))


def test_half_the_tables_of_a_bias(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    weights = make_anchor(rel_pos_bias=True).model.state_dict()
    del weights["blocks.1.attn.relative_position_bias_table"]
    torch.save(weights, tmp_path / "w.pth")
    message = refused(make_anchor(rel_pos_bias=True), tmp_path / "w.pth")
    assert "missing: blocks.1.attn.relative_position_bias_table" in message
    message = refused(make_anchor(), tmp_path / "w.pth")
    assert "unexpected: blocks.0.attn.relative_position_bias_table" in message


def refused(anchor: Anchor, path: Path | str, error: type[Exception] = ValueError) -> str:
    """The message of the error that loading ends in, after checking that it left the anchor as it was."""
    before = state(anchor)
    with pytest.raises(error) as caught:
        load_pretrained(anchor, str(path))
    assert type(caught.value) is error
    assert same(before, state(anchor))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_file(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    refused(make_anchor(), tmp_path / "none.pth", FileNotFoundError)
    refused(make_anchor(), tmp_path, FileNotFoundError)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.999])
def test_truncated_file(suffix: str, keep: float, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    anchor, path = make_anchor(), tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(anchor.model.state_dict(), path)
    else:
        torch.save(anchor.model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert "cut short" in refused(anchor, path)


@pytest.mark.parametrize("start", [b"", b"hello world\n", b"<!DOCTYPE html>", b"\x80\x02}q", b"X\xff\x00\x00\x00"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_checkpoint_at_all(start: bytes, suffix: str, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(start)
    refused(make_anchor(), path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, torch.zeros(3), {"epoch": 3}, {1: 2}])
def test_no_state_dict(content: Any, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    refused(make_anchor(), tmp_path / "w.pth")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_not_run(how: str, protocol: int, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    anchor, path, mark = make_anchor(), tmp_path / "w.pth", tmp_path / "mark"
    content = {"model": anchor.model.state_dict(), "args": RunsCode(mark)}
    if how == "torch.save":
        torch.save(content, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert "run code" in refused(anchor, path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(content["args"]))  # the check can fail: unpickled, it does make the file
    assert mark.exists()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (dict(depth=3), r"unexpected: blocks\.2\.\S+"),
        (dict(depth=1), r"missing: blocks\.1\.\S+"),
        (dict(width=64), r"mismatched: cls_token \(\(1, 1, 64\) in the file, \(1, 1, 32\) in the anchor\)"),
        (dict(init_values=0.0), r"missing: blocks\.0\.ls1\.gamma, .*blocks\.1\.ls2\.gamma"),
        (dict(model="vit_base_patch16_clip_224"), r"unexpected: .*norm_pre\.weight"),
        (dict(model="vit_tiny_patch16_224"), "pos_embed"),
        (dict(model="vit_tiny_patch16_224", img_size=48), "pos_embed|missing: .*ls1"),
        (dict(model="vit_base_patch16_gap_224", img_size=48), "missing: cls_token"),
        (dict(model="vit_little_patch16_reg4_gap_256"), "reg_token"),
    ],
)
def test_another_architecture(other: dict[str, Any], says: str, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    torch.save(make_anchor(**other).model.state_dict(), tmp_path / "w.pth")
    message = refused(make_anchor(), tmp_path / "w.pth")
    assert re.search(says, message) and "2 blocks, width 32" in message


def test_a_network_of_two_anchors(make_network: Callable[..., StitchedNetwork], tmp_path: Path) -> None:
    network = make_network(depths=(2, 2))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert "2 anchors" in refused(network.anchor(0), tmp_path / "w.pth")


@pytest.mark.parametrize("source", [False, 3])
def test_a_source_is_a_string_or_true(source: Any, make_anchor: MakeAnchor) -> None:
    with pytest.raises(TypeError, match=str(source)):
        load_pretrained(make_anchor(), source)
