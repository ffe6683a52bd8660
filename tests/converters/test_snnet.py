"""Released checkpoints of SN-Net: what the converted model computes, its tensors, and what is refused."""

import copy
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from timm.models.swin_transformer import checkpoint_filter_fn
from yacs.config import CfgNode

from mmsnnet.apis import load_config
from mmsnnet.apis.model import build_without_weights
from mmsnnet.converters import snnet
from mmsnnet.converters.snnet import convert_snnet, to_mmsnnet
from mmsnnet.models import StitchedBackbone
from mmsnnet.registry import MODELS
from tests.converters.published_snnet import FAMILIES, Weights, create_models, layers_of, released_weights
from tests.stitching.published.walk import walk

CONFIGS = Path(__file__).parents[2] / "configs/imagenet"
CONFIG = dict(deit="deit-ti-s-b_8xb128-50e", swin="swin-ti-s-b_8xb128-50e", resnet="resnet18-50_8xb128-30e") | dict(
    resnet_swin="resnet18-swin-ti_8xb128-30e", levit="levit-192-256_8xb128-100e"
)


def settings(family: str) -> dict[str, Any]:
    """The settings of our backbone for a tiny family."""
    published = FAMILIES[family]
    norm = dict(skip_final_norm=True) if family == "deit" else {}
    return dict(anchors=published.settings(), img_size=published.size, skip_stages=published.skip) | norm


@pytest.fixture(autouse=True)
def tiny_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES:
        monkeypatch.setitem(snnet.FAMILIES, family, settings(family))


@pytest.fixture(scope="module")
def released() -> Callable[[str], tuple[list[Any], Weights]]:
    """The models and the weights of a released file, made once for each family."""
    made: dict[str, tuple[list[Any], Weights]] = {}

    def make(family: str) -> tuple[list[Any], Weights]:
        if family not in made:
            models = create_models(FAMILIES[family])
            made[family] = models, released_weights(FAMILIES[family], models)
        models, weights = made[family]
        return models, dict(weights)

    return make


Released = Callable[[str], tuple[list[Any], Weights]]


def save(path: Path, weights: Weights, wrapper: str = "model", **more: Any) -> Path:
    torch.save({wrapper: weights, **more}, path)
    return path


def read(path: Path) -> Weights:
    return torch.load(path, weights_only=True)["state_dict"]


# What the published model computes


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_route_of_a_released_model_gives_the_published_logits(
    family: str, released: Released, tmp_path: Path
) -> None:
    """In double precision, so that only wrong weights could differ."""
    published, (models, weights) = FAMILIES[family], released(family)
    source = save(tmp_path / "released.pth", weights, published.wrapper, epoch=49)
    convert_snnet(source, tmp_path / "ours.pth", family)
    backbone = dict(type="mmsnnet.StitchedBackbone", scheme="sliding_window", rank=0, **settings(family))
    model = MODELS.build(dict(type="mmsnnet.StitchedClassifier", backbone=backbone)).eval()
    model.load_state_dict(read(tmp_path / "ours.pth"), strict=True)
    model.double()
    images = torch.randn(2, 3, published.size, published.size, generator=torch.Generator().manual_seed(2)).double()
    walked = [copy.deepcopy(one).double() for one in models]
    layers = {name: (weight.double(), bias.double()) for name, (weight, bias) in layers_of(weights).items()}
    seen = []
    for stitch, route in zip(model.backbone.space, published.routes, strict=True):
        model.backbone.set_stitch(stitch)
        expected = walk(walked, route, layers, images, final_norm=False)
        seen.append(expected)
        assert (model(images) - expected).norm() < 1e-6 * expected.norm(), route
    assert all(not torch.allclose(one, other) for one, other in pairwise(seen))


def test_the_names_of_the_released_swin_are_those_that_timm_reads(released: Released) -> None:
    models, weights = released("swin")
    for index, model in enumerate(models):
        prefix = f"anchors.{index}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        assert same(checkpoint_filter_fn(own, model), model.state_dict())


def same(result: Weights, wanted: Weights) -> bool:
    return result.keys() == wanted.keys() and all(torch.equal(value, wanted[key]) for key, value in result.items())


# The tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_kept_once_and_to_the_bit(family: str, released: Released) -> None:
    _, weights = released(family)
    conversion = to_mmsnnet(weights, network(family))
    kept = [value for name, value in conversion.weights.items() if not name.endswith((".grid", ".draws"))]
    buffers = ("relative_position_index", "attn_mask", "attention_bias_idxs", "aux_bn")
    wanted = [value for name, value in weights.items() if not any(buffer in name for buffer in buffers)]
    assert sorted(value.data_ptr() for value in kept) == sorted(value.data_ptr() for value in wanted)
    assert sum(conversion.mapped.values()) + sum(conversion.dropped.values()) == len(weights)
    assert sum(conversion.mapped.values()) + sum(conversion.added.values()) == len(conversion.weights)
    assert conversion.unused == ()


def network(family: str) -> Any:
    with torch.device("meta"):
        return StitchedBackbone(num_classes=1000, scheme="sliding_window", rank=0, **settings(family)).network


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_model_fits_its_config(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size, by names and shapes; and the converter builds the anchors of the config."""
    monkeypatch.undo()
    config = load_config(CONFIGS / f"stitched-{CONFIG[family]}_imagenet-224x224.py")
    backbone = config.model.backbone
    built = dict(anchors=[dict(model=anchor.model) for anchor in backbone.anchors])
    built |= {key: backbone[key] for key in ("skip_stages", "skip_final_norm") if key in backbone}
    assert built == snnet.FAMILIES[family]
    assert (backbone.scheme, backbone.rank, config.model.get("num_classes", 1000)) == ("sliding_window", 0, 1000)
    ours = build_without_weights(config)
    full = FAMILIES[family]._replace(size=224, anchors=tuple(dict(model=a.model) for a in backbone.anchors))
    with torch.device("meta"):
        models = create_models(full)
        weights = released_weights(full, models)
    converted = to_mmsnnet(weights, ours.backbone.network).weights
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in ours.state_dict().items()
    }


def test_layers_that_no_route_crosses_are_left_out_by_name(released: Released, tmp_path: Path) -> None:
    """The published code may make one for each block of the front anchor."""
    _, weights = released("swin")
    convert_snnet(save(tmp_path / "released.pth", weights), tmp_path / "ours.pth", "swin")
    last = "stitch_layers.2.1.16.transform"
    more = {f"stitch_layers.2.1.17.transform.{name}": weights[f"{last}.{name}"] for name in ("weight", "bias")}
    conversion = convert_snnet(save(tmp_path / "more.pth", weights | more), tmp_path / "ours2.pth", "swin")
    assert conversion.unused == ("stitch_layers.2.1.17",)
    assert same(read(tmp_path / "ours.pth"), read(tmp_path / "ours2.pth"))
    beyond = {name.replace("17", "18"): value for name, value in more.items()}
    is_refused(save(tmp_path / "beyond.pth", weights | beyond), "swin", r"left over: stitch_layers\.2\.1\.18\.")


def test_files_are_read_with_what_training_programs_save_beside_weights(released: Released, tmp_path: Path) -> None:
    """Microsoft's programs save their config, an object of a class of yacs."""
    _, weights = released("swin")
    config = CfgNode(dict(DATA=dict(BATCH_SIZE=128), TAG="default"))
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    source = save(tmp_path / "released.pth", wrapped, config=config, max_accuracy=84.2, optimizer=dict(state={}))
    convert_snnet(source, tmp_path / "ours.safetensors", "swin")
    assert same(
        safetensors.torch.load_file(tmp_path / "ours.safetensors"), to_mmsnnet(weights, network("swin")).weights
    )


# Mistakes


def is_refused(source: Path, family: str, message: str) -> None:
    """Assert that a conversion fails with one line that names the file, and changes no file."""
    target = source.with_name("target.pth")
    target.write_bytes(b"old")
    there = sorted(source.parent.iterdir())
    with pytest.raises(ValueError, match=rf"^checkpoint '{re.escape(str(source))}': .*{message}") as caught:
        convert_snnet(source, target, family)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"old" and sorted(source.parent.iterdir()) == there


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_is_named(family: str, released: Released, tmp_path: Path) -> None:
    source = save(tmp_path / "released.pth", released(family)[1])
    for other in FAMILIES:
        if other != family:
            is_refused(source, other, f"names are those of the family {family}, not of {other}: set --family {family}$")


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def exchanged(weights: Weights) -> Weights:
    """Two equal blocks of a LeViT in each other's place."""
    others = {"2": "4", "4": "2"}
    at = re.compile(r"(?<=^anchors\.1\.blocks\.)[24](?=\.)")
    names = [at.sub(lambda match: others[match[0]], name) for name in weights]
    return {name: weights[name] for name in names}


REFUSED: dict[str, tuple[str, Callable[[Weights], Weights], str]] = {
    "no norm": (
        "deit",
        without("anchors.2.norm.bias"),
        r"missing: anchors\.2\.norm\.bias \(32,\)\. Convert",
    ),
    "no anchor": ("deit", without("anchors.2."), r"missing: anchors\.2\.cls_token"),
    "no layer": (
        "deit",
        without("stitch_layers.1.10."),
        r"missing: stitch_layers\.1\.10\.transform\.weight",
    ),
    "downsampling": (
        "swin",
        without("anchors.1.layers.1.downsample.norm.weight"),
        r"missing: anchors\.1\.layers\.1\.downsample\.norm\.weight \(64,\)",
    ),
    "another entry": (
        "resnet",
        lambda weights: weights | {"anchors.0.layer1.2.conv1.weight": torch.zeros(8, 8, 3, 3)},
        r"left over: anchors\.0\.layer1\.2\.conv1\.weight \(8, 8, 3, 3\)",
    ),
    "another width": (
        "resnet_swin",
        lambda weights: weights | {"stitch_layers.0.0.0.transform.weight": torch.zeros(16, 13, 1, 1)},
        r"of another shape: stitch_layers\.0\.0\.0\.transform\.weight \(16, 13, 1, 1\) instead of \(16, 12, 1, 1\)",
    ),
    "another window": (
        "swin",
        lambda weights: weights | {"anchors.0.layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(25, 1)},
        r"of another shape: anchors\.0\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table \(25, 1\) instead of",
    ),
    "sorted": (
        "levit",
        lambda weights: dict(sorted(weights.items())),
        r"known by their order, so convert the file as it was released.*; found anchors\.0\.blocks\.0\.m\.",
    ),
    "equal blocks in another order": (
        "levit",
        exchanged,
        r"the blocks of anchors\.1\.\* do not ascend",
    ),
    "a LeViT cut short": ("levit", without("anchors.1.head_dist.l.bias"), r"found the end in place of bias \(1000,\)"),
    "another model": ("deit", lambda weights: {"conv1.weight": torch.zeros(2)}, r"no stitched model of SN-Net.*conv1"),
    "text": ("deit", lambda weights: weights | {"anchors.0.name": "Ti"}, ""),
}


@pytest.mark.parametrize(("family", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_file_is_refused_as_a_whole(
    family: str, change: Callable[[Weights], Weights], message: str, released: Released, tmp_path: Path
) -> None:
    source = save(tmp_path / "released.pth", change(released(family)[1]))
    if message:
        is_refused(source, family, message)
    else:
        with pytest.raises(ValueError, match=r"entries that are no tensors: anchors\.0\.name"):
            convert_snnet(source, tmp_path / "ours.pth", family)


def test_a_converted_file_is_not_converted_again(released: Released, tmp_path: Path) -> None:
    source = save(tmp_path / "released.pth", released("deit")[1])
    convert_snnet(source, tmp_path / "ours.pth", "deit")
    is_refused(tmp_path / "ours.pth", "deit", "these names are mmsnnet's already")
    with pytest.raises(ValueError, match="is the source: name another file"):
        convert_snnet(source, source, "deit")
