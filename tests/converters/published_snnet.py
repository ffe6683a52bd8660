"""SN-Net as published: tiny models of its five families, and the names of a released checkpoint.

Written from facts about the released files, without code of the package: timm's models give the tensors, and the JSON
files in ``tests/stitching/published`` the stitching layers.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import timm
import torch
from timm.models.levit import Levit
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from tests.stitching.published.walk import layer_sizes, read

Weights = dict[str, Tensor]


class Published(NamedTuple):
    """A family: the name of its JSON file, the arguments of timm's models beside depths, and stages not stitched."""

    file: str
    anchors: tuple[dict[str, Any], ...]
    size: int
    skip: tuple[int, ...] = ()
    wrapper: str = "model"  # the key of the weights in a released file

    @property
    def layers(self) -> dict[str, tuple[int, int, int]]:
        """The stage, the front and the back anchor of each stitching layer, by its released name."""
        return layer_sizes(read(self.file))

    @property
    def routes(self) -> list[dict[str, Any]]:
        return read(self.file)["stitches"]

    def settings(self) -> list[dict[str, Any]]:
        """The arguments of ``timm.create_model``, depths included."""
        depths = [entry["depths"] for entry in read(self.file)["anchors"]]
        sizes = {"deit": lambda d: dict(depth=d[0]), "swin": lambda d: dict(depths=d), "levit": lambda d: dict(depth=d)}
        return [
            anchor | sizes.get(anchor["model"].split("_")[0], lambda d: dict(layers=d))(depth)
            for anchor, depth in zip(self.anchors, depths, strict=True)
        ]


def _swin(size: str, width: int) -> dict[str, Any]:
    return dict(model=f"swin_{size}_patch4_window7_224", embed_dim=width, num_heads=(1, 2, 2, 4), window_size=2)


def _deit(size: str, width: int) -> dict[str, Any]:
    return dict(model=f"deit_{size}_patch16_224", embed_dim=width, num_heads=2)


def _levit(number: int, *widths: int) -> dict[str, Any]:
    return dict(model=f"levit_{number}", embed_dim=widths, key_dim=4, num_heads=(2, 3, 4))


RESNET18 = dict(model="resnet18", channels=(8, 12, 16, 20))
FAMILIES = {
    "deit": Published("deit_ti_s_b", (_deit("tiny", 16), _deit("small", 24), _deit("base", 32)), 32),
    "swin": Published("swin_ti_s_b", (_swin("tiny", 8), _swin("small", 8), _swin("base", 16)), 32, (3,)),
    "resnet": Published(
        "resnet18_resnet50", (RESNET18, dict(model="resnet50", channels=(8, 8, 8, 8))), 64, (0, 3), "state_dict"
    ),
    "resnet_swin": Published("resnet18_swin_ti", (RESNET18, _swin("tiny", 8)), 32, (0, 3), "state_dict"),
    "levit": Published("levit_192_256", (_levit(192, 16, 24, 32), _levit(256, 24, 32, 48)), 64, (2,)),
}


def create_models(family: Published) -> list[Any]:
    """timm's models with random weights in which no part is the identity."""
    models = []
    for settings in family.settings():
        size = {} if "resnet" in settings["model"] else dict(img_size=family.size)
        models.append(timm.create_model(settings.pop("model"), **settings, **size).eval())
    generator = torch.Generator().manual_seed(0)
    for model in models:
        for name, tensor in model.state_dict().items():
            # Norms, their statistics, biases. timm draws the weights of layers.
            if tensor.is_floating_point() and not tensor.is_meta and (tensor.ndim == 1 or "attention_biases" in name):
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
    return models


def released_weights(family: Published, models: list[Any]) -> Weights:
    """The weights of a released file: of anchors under their published names, and random stitching layers."""
    generator = torch.Generator().manual_seed(1)
    weights = {f"anchors.{i}.{name}": value for i, model in enumerate(models) for name, value in _named(model)}
    for name, (stage, front, back) in family.layers.items():
        source, target = (_widths(models[anchor])[stage] for anchor in (front, back))
        pixels = (1, 1) if isinstance(models[front], ResNet) else ()
        place = f"stitch_layers.{name}.transform"
        weights[f"{place}.weight"] = torch.randn(target, source, *pixels, generator=generator) / source**0.5
        weights[f"{place}.bias"] = torch.randn(target, generator=generator)
    return weights


def layers_of(weights: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight (out, in) and bias of each stitching layer in a released file, by the name in the JSON files."""
    names = [name.removesuffix(".transform.bias") for name in weights if re.match(r"stitch_layers\..*bias", name)]
    return {
        name.removeprefix("stitch_layers."): (
            weights[f"{name}.transform.weight"].flatten(1),
            weights[f"{name}.transform.bias"],
        )
        for name in names
    }


def _widths(model: Any) -> list[int]:
    """The channels that leave each stage."""
    if isinstance(model, SwinTransformer):
        return [model.embed_dim * 2**stage for stage in range(4)]
    if isinstance(model, ResNet | Levit):
        return [info["num_chs"] for info in model.feature_info][-4:]
    return [model.embed_dim]


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The published names of a model's tensors, with what the published models store beside them."""
    if isinstance(model, SwinTransformer):
        yield from _microsofts(model)
    elif isinstance(model, Levit):
        yield from _facebooks(model)
    elif isinstance(model, ResNet):
        for name, value in model.state_dict().items():
            yield name, value
            owner, _, leaf = name.rpartition(".")
            if isinstance(model.get_submodule(owner), nn.BatchNorm2d):
                yield f"{owner}.aux_bn.0.{leaf}", torch.full_like(value, 7)
    else:
        yield from model.state_dict().items()


def _microsofts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Downsampling ends a stage, the head is one linear layer, and blocks store their buffers."""
    for name, value in model.state_dict().items():
        if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
            name = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
        yield name.replace("head.fc", "head"), value
        if name.endswith("relative_position_bias_table"):
            owner = name.rpartition(".")[0]
            yield f"{owner}.relative_position_index", torch.zeros(4, 4, dtype=torch.int64)
            yield f"{owner.rpartition('.')[0]}.attn_mask", torch.zeros(1, 4, 4)


def _facebooks(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Attentions and MLPs are one flat list; modules in a row have numbers, and linear layers the names c and l."""
    numbers: dict[str, int] = {}
    inner = {"qkv.": "qkv.", "kv.": "kv.", "q.ln.": "q.1.", "proj.ln.": "proj.1.", "ln1.": "0.", "ln2.": "2."}
    for name, value in model.state_dict().items():
        if match := re.fullmatch(r"stem\.conv(\d)\.(.+)", name):
            name = f"patch_embed.{2 * int(match[1]) - 2}.{match[2]}"
        elif match := re.match(r"stages\.\d+\.(?:blocks\.\d+|downsample)\.(attn_downsample|attn|mlp)\.", name):
            number, rest = numbers.setdefault(match[0], len(numbers)), name[match.end() :]
            # Only the attention that downsamples has no residual, and so no inner module m.
            place = f"blocks.{number}." + ("" if match[1] == "attn_downsample" else "m.")
            part = next((part for part in inner if rest.startswith(part)), "")
            name = place + inner.get(part, "") + rest.removeprefix(part)
            if rest == "attention_biases":
                yield f"{place}{rest}", value
                yield f"{place}attention_bias_idxs", torch.zeros(4, 4, dtype=torch.int64)
                continue
        yield name.replace(".linear.", ".l." if name.startswith("head") else ".c."), value
