"""Released checkpoints of SN-Netv2: the figures of the converted model, its tensors, and what is refused."""

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmsnnet.apis import build_model, load_config
from mmsnnet.converters.snnetv2 import convert_snnetv2, to_mmsnnet
from mmsnnet.registry import MODELS
from tests.converters.published_snnetv2 import (
    Published,
    Reference,
    Weights,
    changed,
    merged_weights,
    released_weights,
    stitches,
)

TAPS = (9, 14, 19, 23)
PAIR = Published()
TINY = Published(depths=(2, 4), widths=(16, 24), heads=(2, 3), grid=(2, 2), rank=3)
CLASSIFIER = TINY._replace(classes=5)
TABLE, INDEX = "attn.relative_position_bias_table", "attn.relative_position_index"


def backbone_config(model: Published, **settings: Any) -> dict[str, Any]:
    """The config of our backbone for a published pair."""
    names = ("deit3_small_patch16_224", "deit3_large_patch16_224")
    sizes = zip(names, model.depths, model.widths, model.heads, strict=True)
    bias = {} if model.classes else dict(rel_pos_bias=True)
    anchors = [dict(model=n, depth=d, embed_dim=w, num_heads=h, **bias) for n, d, w, h in sizes]
    img_size = tuple(side * model.patch for side in model.grid)
    return dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=img_size, rank=model.rank) | settings


def write_config(folder: Path, model: Published, **settings: Any) -> Path:
    """A config of a segmentor around our backbone for a published pair."""
    head = dict(type="FCNHead", in_channels=model.widths[1], channels=8, num_classes=5, num_convs=1, in_index=0)
    segmentor = dict(type="EncoderDecoder", backbone=backbone_config(model, **settings), test_cfg=dict(mode="whole"))
    segmentor["decode_head"] = head | dict(norm_cfg=dict(type="BN"))
    path = folder / "config.py"
    path.write_text(f"default_scope = 'mmseg'\nmodel = {segmentor!r}\n")
    return path


def saved(path: Path, weights: Weights) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save({"state_dict": weights}, path)
    return path


def read(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)["state_dict"]


def same(result: Weights, wanted: Weights) -> bool:
    return result.keys() == wanted.keys() and all(
        value.dtype == wanted[key].dtype and torch.equal(value, wanted[key]) for key, value in result.items()
    )


def image(model: Published) -> Tensor:
    height, width = (side * model.patch for side in model.grid)
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))


def distance(result: Tensor, wanted: Tensor) -> float:
    return ((result.double() - wanted).norm() / wanted.norm()).item()


def converted(model: Published, weights: Weights, tmp_path: Path, **options: Any) -> Weights:
    """The weights of a file that was converted."""
    source, target = tmp_path / "released.pth", tmp_path / "ours.pth"
    torch.save({"model" if model.classes else "state_dict": weights, "meta": {}}, source)
    convert_snnetv2(source, target, **options)
    return torch.load(target, weights_only=True)["state_dict"]


@torch.inference_mode()
def tap_distances(
    model: Published,
    weights: Weights,
    reference: Weights,
    out_indices: tuple[int, ...],
    ids: tuple[int, ...] | None = None,
) -> dict[int, float]:
    """The largest distance of a tap for each stitch: ours with ``weights``, the published ones with ``reference``."""
    backbone = MODELS.build(backbone_config(model, out_indices=out_indices)).eval()
    own = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    backbone.load_state_dict(own, strict=True)
    routes, pixels, published = dict(stitches(model)), image(model), Reference(model, reference)
    assert list(routes) == [stitch.id for stitch in backbone.space]
    result = {}
    for id_ in ids or routes:
        backbone.set_stitch(id_)
        wanted = published.taps(pixels, routes[id_], out_indices)
        result[id_] = max(distance(tap[0], map_) for tap, map_ in zip(backbone(pixels[None]), wanted, strict=True))
    return result


# What the published model computes


@pytest.mark.slow
@pytest.mark.parametrize("model", [PAIR, Published(depths=(12, 12), grid=(3, 5), rank=4)], ids=["12-24", "12-12"])
def test_every_stitch_of_a_released_segmentation_model_gives_the_published_taps(
    model: Published, tmp_path: Path
) -> None:
    weights = released_weights(model)
    out_indices = TAPS if model.depths[1] == 24 else (2, 5, 8, 11)
    result = tap_distances(model, converted(model, weights, tmp_path), weights, out_indices)
    assert len(result) == 134
    assert {id_: error for id_, error in result.items() if not error < 1e-5} == {}


@pytest.mark.slow
def test_a_file_saved_in_evaluation_mode_gives_the_same_taps_with_merged(tmp_path: Path) -> None:
    weights = released_weights(PAIR)
    merged = merged_weights(PAIR, weights)
    result = tap_distances(PAIR, converted(PAIR, merged, tmp_path, merged=True), weights, TAPS)
    assert len(result) == 134
    assert {id_: error for id_, error in result.items() if not error < 1e-5} == {}
    # Without --merged the update counts twice in every stitch with a stitching layer.
    twice = tap_distances(PAIR, converted(PAIR, merged, tmp_path), weights, TAPS, ids=(0, 1, 2, 24, 79, 80))
    assert {id_ for id_, error in twice.items() if error > 1e-2} == {0, 2, 24, 79, 80}


@pytest.mark.slow
@torch.inference_mode()
def test_every_stitch_of_a_released_classification_model_gives_the_published_logits(tmp_path: Path) -> None:
    model = PAIR._replace(classes=7, rank=8)
    weights = released_weights(model)
    config = dict(type="mmsnnet.StitchedClassifier", backbone=backbone_config(model), num_classes=7)
    classifier = MODELS.build(config).eval()
    classifier.load_state_dict(converted(model, weights, tmp_path), strict=True)
    pixels, published, result = image(model), Reference(model, weights), {}
    for id_, route in stitches(model):
        classifier.backbone.set_stitch(id_)
        result[id_] = distance(classifier(pixels[None])[0], published.logits(pixels, route))
    assert len(result) == 134
    assert {id_: error for id_, error in result.items() if not error < 1e-5} == {}


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        *((TABLE, lambda table, row=row: table.index_fill(0, torch.tensor([row]), 0.0)) for row in (0, -3, -2, -1)),
        *((ending, torch.zeros_like) for ending in ("lora_A", "lora_B", "transform.bias", "cls_token", "pos_embed")),
        *((ending, torch.ones_like) for ending in ("gamma_1", "gamma_2", "ln1.weight", "ln2.weight")),
        *((ending, torch.zeros_like) for ending in ("qkv.bias", "proj.bias", "ln1.bias", "ln2.bias")),
        *((ending, torch.zeros_like) for ending in ("ffn.layers.0.0.bias", "ffn.layers.1.bias", "projection.bias")),
    ],
)
def test_the_comparison_depends_on_every_part(ending: str, change: Callable[[Tensor], Tensor]) -> None:
    weights = released_weights(TINY)
    own = to_mmsnnet(changed(weights, ending, change)).weights
    assert max(tap_distances(TINY, own, weights, (1, 3)).values()) > 1e-3


# The tensors


def without_updates(weights: Weights) -> Weights:
    return {key: value for key, value in weights.items() if "lora_" not in key}


@pytest.mark.parametrize(
    ("model", "keep"),
    [
        (TINY, dict),
        (TINY._replace(grid=(2, 3)), dict),
        (TINY._replace(depths=(3, 3), widths=(16, 16), heads=(2, 2)), dict),
        (TINY, without_updates),
        (TINY, lambda weights: {key: value for key, value in weights.items() if "relative_position" not in key}),
        (TINY, lambda weights: {key: value if INDEX in key else value.half() for key, value in weights.items()}),
        (CLASSIFIER, dict),
    ],
    ids=["segmentation", "rectangular", "equal anchors", "rank 0", "no tables", "half precision", "classification"],
)
def test_every_tensor_is_kept_once_and_to_the_bit(model: Published, keep: Callable[[Weights], Weights]) -> None:
    weights = keep(released_weights(model))
    converted = to_mmsnnet(weights).weights
    added = [key for key in converted if key.endswith((".grid", ".draws"))]
    remaining = [id(value) for key, value in converted.items() if key not in added]
    assert sorted(remaining) == sorted(id(value) for key, value in weights.items() if not key.endswith(INDEX))


@pytest.mark.parametrize("model", [TINY, CLASSIFIER], ids=["segmentation", "classification"])
def test_the_names_and_shapes_are_those_of_our_model(model: Published, tmp_path: Path) -> None:
    if model.classes:
        backbone = backbone_config(model)
        ours = MODELS.build(dict(type="mmsnnet.StitchedClassifier", backbone=backbone, num_classes=model.classes))
    else:
        ours = build_model(load_config(write_config(tmp_path, model)))
    wanted = {key: value.shape for key, value in ours.state_dict().items() if "_head." not in key}
    weights = to_mmsnnet(without("_head.")(released_weights(model))).weights
    assert {key: value.shape for key, value in weights.items()} == wanted


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_either_format_are_the_same_each_time(suffix: str, tmp_path: Path) -> None:
    source = saved(tmp_path / f"released{suffix}", released_weights(TINY))
    targets = [tmp_path / f"{name}{suffix}" for name in ("ours", "ours_again")]
    for target in targets:
        convert_snnetv2(source, target)
    assert targets[0].read_bytes() == targets[1].read_bytes()
    assert same(read(targets[0]), to_mmsnnet(released_weights(TINY)).weights)


def test_a_released_classification_file_has_its_weights_under_model_and_may_have_more(tmp_path: Path) -> None:
    weights = released_weights(CLASSIFIER)
    file = {"model": weights, "optimizer": {"state": {0: 1.0}}, "epoch": 49, "args": Namespace(lr=3e-5)}
    torch.save(file, tmp_path / "released.pth")
    conversion = convert_snnetv2(tmp_path / "released.pth", tmp_path / "ours.pth")
    assert same(read(tmp_path / "ours.pth"), to_mmsnnet(weights).weights)
    assert conversion.structure.task == "classification"


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.module.", "nested"])
def test_a_file_may_be_wrapped_as_training_programs_do(wrap: str, tmp_path: Path) -> None:
    weights = released_weights(TINY)
    prefixed = {f"{wrap}{key}": value for key, value in weights.items()}
    torch.save({"state_dict": {"model": weights} if wrap == "nested" else prefixed}, tmp_path / "released.pth")
    convert_snnetv2(tmp_path / "released.pth", tmp_path / "ours.pth")
    assert same(read(tmp_path / "ours.pth"), to_mmsnnet(weights).weights)


def test_a_file_may_leave_out_all_indices() -> None:
    """The rows of the tables tell the grid, unless two grids have as many."""
    weights = released_weights(TINY)
    conversion = to_mmsnnet(without(INDEX)(weights))
    assert same(conversion.weights, to_mmsnnet(weights).weights) and conversion.structure.grid == TINY.grid
    assert conversion.dropped == {}
    oblong = TINY._replace(grid=(2, 3))
    weights = released_weights(oblong)
    with pytest.raises(ValueError, match="2 x 3 or 3 x 2 patches: set --config to the model's config"):
        to_mmsnnet(without(INDEX)(weights))
    assert same(to_mmsnnet(without(INDEX)(weights), grid=(2, 3)).weights, to_mmsnnet(weights).weights)


def test_the_grid_is_recorded() -> None:
    """Of two grids with as many patches and rows of tables, the right one."""
    for grid in ((2, 3), (3, 2)):
        weights = to_mmsnnet(released_weights(TINY._replace(grid=grid))).weights
        assert [weights[f"backbone.network.anchors.{a}.grid"].tolist() for a in (0, 1)] == [list(grid)] * 2
    # Six patches without tables can have four grids: none is recorded.
    weights = to_mmsnnet(released_weights(CLASSIFIER._replace(grid=(2, 3)))).weights
    assert not any(key.endswith(".grid") for key in weights)


def test_the_classes_of_a_run_of_mmseg_are_kept(tmp_path: Path) -> None:
    file = {
        "state_dict": released_weights(TINY),
        "meta": {"dataset_meta": {"classes": ["a", "b"]}, "iter": 160000},
        "message_hub": {"log_scalars": {"loss": HistoryBuffer([2.0, 1.0], [1, 1])}},
    }
    torch.save(file, tmp_path / "released.pth")
    convert_snnetv2(tmp_path / "released.pth", tmp_path / "ours.pth")
    result = torch.load(tmp_path / "ours.pth", weights_only=True)["meta"]
    assert result["dataset_meta"] == {"classes": ["a", "b"]} and set(result) == {"dataset_meta", "mmsnnet_version"}


def test_an_update_is_subtracted_to_the_rounding_of_the_weight() -> None:
    weights = released_weights(TINY)
    own, unmerged = to_mmsnnet(weights), to_mmsnnet(merged_weights(TINY, weights), merged=True)
    # 2 blocks and 4: two layers to the large anchor, one back.
    assert (own.unmerged, unmerged.unmerged) == (0, 3)
    for key, value in own.weights.items():
        torch.testing.assert_close(unmerged.weights[key], value, rtol=0, atol=1e-6)


# The account


def test_names_and_shapes_tell_the_structure() -> None:
    structure = to_mmsnnet(released_weights(TINY._replace(grid=(2, 3)))).structure
    assert (structure.task, structure.depths, structure.widths) == ("segmentation", (2, 4), (16, 24))
    assert (structure.rank, structure.patches, structure.grid, structure.position_bias) == (3, 6, (2, 3), True)
    structure = to_mmsnnet(released_weights(CLASSIFIER)).structure
    assert (structure.task, structure.grid, structure.position_bias) == ("classification", (2, 2), False)
    # Six patches have several grids, and there is no table to tell.
    assert to_mmsnnet(released_weights(CLASSIFIER._replace(grid=(2, 3)))).structure.grid is None


def test_every_tensor_is_in_the_account() -> None:
    weights = released_weights(TINY)
    there = to_mmsnnet(weights)
    index = "backbone.anchors.{a}.layers.{i}.attn.relative_position_index"
    assert sum(there.mapped.values()) + sum(there.dropped.values()) == len(weights)
    assert sum(there.mapped.values()) + sum(there.added.values()) == len(there.weights)
    # 6 blocks, 2 layers one way, 1 the other.
    pairs = {
        ("backbone.anchors.{a}.layers.{i}.gamma_1", "backbone.network.anchors.{a}.model.blocks.{i}.ls1.gamma"): 6,
        ("backbone.stitch_layers.0.{i}.transform.lora_A", "backbone.network.layers.0_{j}-1_{k}.lora_A"): 2,
        ("backbone.stitch_layers.1.{i}.transform.lora_A", "backbone.network.layers.1_{j}-0_{k}.lora_A"): 1,
        ("decode_head.*", "decode_head.*"): 3,
        ("auxiliary_head.*", "auxiliary_head.*"): 2,
    }
    assert {pair: there.mapped.get(pair) for pair in pairs} == pairs
    records = {"backbone.draws": 1, "backbone.network.anchors.{a}.grid": 2}
    assert (dict(there.dropped), dict(there.added)) == ({index: 6}, records)


# What is refused


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if not any(part in key for part in parts)}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {new if key == old else key: value for key, value in weights.items()}


def replaced(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {key: change(weights[key])}


BLOCK = "backbone.anchors.1.layers.3."
LAYER = "backbone.stitch_layers.0.1.transform."
REFUSED = {
    "missing": (without(f"{BLOCK}attn.qkv.bias"), f"missing: {BLOCK}attn.qkv.bias \\(72,\\)$"),
    "renamed": (
        renamed(f"{BLOCK}ln1.weight", f"{BLOCK}norm1.weight"),
        f"missing: {BLOCK}ln1.weight \\(24,\\); left over: {BLOCK}norm1.weight \\(24,\\)$",
    ),
    "renamed as if of one more block": (
        renamed(f"{BLOCK}ln1.weight", "backbone.anchors.1.layers.4.ln1.weight"),
        f"missing: {BLOCK}ln1.weight \\(24,\\); left over: backbone.anchors.1.layers.4.ln1.weight \\(24,\\)$",
    ),
    "left over": (lambda weights: weights | {"neck.bias": torch.zeros(3)}, r"left over: neck.bias \(3,\)$"),
    "of another shape": (
        replaced(f"{BLOCK}ffn.layers.0.0.bias", lambda bias: bias[:-1]),
        f"of another shape: {BLOCK}ffn.layers.0.0.bias \\(95,\\) instead of \\(96,\\)$",
    ),
    "of another number of dimensions": (
        replaced("backbone.anchors.0.cls_token", lambda token: token[0]),
        "of another shape: backbone.anchors.0.cls_token \\(1, 16\\) instead of \\(1, 1, 16\\)$",
    ),
    "a layer the other way round": (
        replaced(f"{LAYER}weight", lambda weight: weight.T),
        f"of another shape: {LAYER}weight \\(16, 24\\) instead of \\(24, 16\\)$",
    ),
    "of another rank": (
        replaced(f"{LAYER}lora_A", lambda a: a[:2]),
        f"of another shape: {LAYER}lora_A \\(2, 16\\) instead of \\(3, 16\\)$",
    ),
    "a layer less": (
        without("stitch_layers.1.0."),
        r"missing: backbone\.stitch_layers\.1\.0\.transform\.weight \(16, 24\), ",
    ),
    "many missing": (without("anchors.1.layers.0", "anchors.1.layers.1"), " and 12 more$"),
    "tables in some blocks": (without(f"{BLOCK}{TABLE}"), f"missing: {BLOCK}{TABLE} \\(12, 3\\)$"),
    "an index less": (without(f"{BLOCK}{INDEX}"), f"missing: {BLOCK}{INDEX} \\(5, 5\\)$"),
    "an index in another order": (
        replaced(f"{BLOCK}{INDEX}", lambda index: index.T),
        f"another order than BEiT's: {BLOCK}{INDEX}$",
    ),
    "tables for another grid": (
        lambda weights: changed(weights, TABLE, lambda table: table[1:]),
        "position embeddings for 4 patches do not match relative position tables of 11 rows",
    ),
    "one anchor": (
        without("anchors.1.", "stitch_layers"),
        "expected blocks of two anchors, 0 and 1; found blocks of 1: 0$",
    ),
    "three anchors": (
        lambda weights: (
            weights | {k.replace("anchors.1", "anchors.2"): v for k, v in weights.items() if "anchors.1" in k}
        ),
        "expected blocks of two anchors, 0 and 1; found blocks of 3: 0, 1, 2$",
    ),
    "the last block cut off": (without("anchors.1.layers.3"), "a multiple .* found 3 and 2 blocks$"),
    "no stitched model": (lambda weights: {"conv1.weight": torch.zeros(2)}, "no stitched model: .* got conv1.weight$"),
    "no tensor": (lambda weights: weights | {"decode_head.scale": 2.0}, "no tensors: decode_head.scale$"),
    "no number": (
        lambda weights: weights | {"decode_head.scale": torch.tensor([0.0, torch.nan])},
        "has NaN or infinity in decode_head.scale: download it again$",
    ),
    "ours": (lambda weights: to_mmsnnet(weights).weights, "these names are mmsnnet's already"),
}


def is_refused(source: Path, message: str, **options: Any) -> None:
    """Assert that a conversion fails with the message and changes no file."""
    target = source.with_name("target.pth")
    target.write_bytes(b"old")
    there = sorted(source.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_snnetv2(source, target, **options)
    assert target.read_bytes() == b"old" and sorted(source.parent.iterdir()) == there


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_file_is_refused_as_a_whole(change: Callable[[Weights], Weights], message: str, tmp_path: Path) -> None:
    is_refused(saved(tmp_path / "source.pth", change(released_weights(TINY))), message)


def test_an_incomplete_classification_file_is_refused(tmp_path: Path) -> None:
    weights = without("anchors.1.head.bias")(released_weights(CLASSIFIER))
    is_refused(saved(tmp_path / "source.pth", weights), r"missing: anchors.1.head.bias \(5,\)$")


def test_merged_without_an_update(tmp_path: Path) -> None:
    source = saved(tmp_path / "source.pth", without_updates(released_weights(TINY)))
    is_refused(source, "--merged: the weights have no low-rank updates", merged=True)


def test_another_grid_than_the_models_is_refused(tmp_path: Path) -> None:
    weights = released_weights(TINY._replace(grid=(2, 3)))
    with pytest.raises(ValueError, match="for 2 x 3 patches, the config's model for 3 x 2"):
        to_mmsnnet(weights, grid=(3, 2))
    turned = write_config(tmp_path, TINY._replace(grid=(3, 2)))
    is_refused(
        saved(tmp_path / "source.pth", weights), "for 2 x 3 patches, the config's model for 3 x 2", config=turned
    )


def test_neither_the_source_nor_a_folder_is_overwritten(tmp_path: Path) -> None:
    source = saved(tmp_path / "source.pth", released_weights(TINY))
    before = source.read_bytes()
    with pytest.raises(ValueError, match="is the source"):
        convert_snnetv2(source, tmp_path / "." / "source.pth")
    folder = tmp_path / "folder.pth"
    folder.mkdir()
    with pytest.raises(OSError, match="is a folder"):
        convert_snnetv2(source, folder)
    with pytest.raises(ValueError, match=r"ends in \.pth, \.pt, \.safetensors; got .*ours.ckpt'"):
        convert_snnetv2(source, tmp_path / "ours.ckpt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_snnetv2(tmp_path / "nowhere.pth", tmp_path / "ours.pth")
    assert source.read_bytes() == before and sorted(tmp_path.iterdir()) == [folder, source]


class Malicious:
    """Makes a folder if its pickle is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    mark, source = tmp_path / "mark", tmp_path / "source.pth"
    torch.save({"state_dict": released_weights(TINY), "meta": Malicious(mark)}, source)
    is_refused(source, "asks for posix.mkdir")
    assert not mark.exists()
    torch.load(source, weights_only=False)
    assert mark.exists()


# With a config


def with_heads_of(config: Path, weights: Weights) -> Weights:
    """Released weights, with the heads of a config's model."""
    heads = {key: value for key, value in build_model(load_config(config)).state_dict().items() if "_head." in key}
    return without("_head.")(weights) | heads


def test_what_fits_a_config_loads_into_its_model(tmp_path: Path) -> None:
    config = write_config(tmp_path, TINY)
    source = saved(tmp_path / "source.pth", with_heads_of(config, released_weights(TINY)))
    convert_snnetv2(source, tmp_path / "ours.pth", config=config)
    model = build_model(load_config(config), tmp_path / "ours.pth")
    assert same(model.state_dict(), read(tmp_path / "ours.pth")) and model.backbone.network.initialized


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=4), "of another shape: backbone.network.layers.0_0-1_2.lora_A"),
        (dict(rank=0), "left over: backbone.network.layers.0_0-1_2.lora_A"),
        (dict(img_size=64), "for 2 x 2 patches, the config's model for 4 x 4"),
        (dict(scheme="one_way"), "left over: backbone.network.layers.1_1-0_1.weight"),
    ],
)
def test_what_does_not_fit_a_config_is_listed(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, TINY, **settings)
    source = saved(tmp_path / "source.pth", with_heads_of(config, released_weights(TINY)))
    is_refused(source, message, config=config)


def test_heads_must_fit_the_config_too(tmp_path: Path) -> None:
    source = saved(tmp_path / "source.pth", released_weights(TINY))
    is_refused(source, "missing: decode_head.convs.0.conv.weight", config=write_config(tmp_path, TINY))
