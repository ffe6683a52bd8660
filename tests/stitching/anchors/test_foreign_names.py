"""Weights under other libraries' names: timm's weights, renamed by rules written here, are loaded again.

The names are those of the libraries' own sources: transformers 4.57 (and 5, where it says so), mmpretrain 1.2,
MMSegmentation 1.2, torchvision 0.21.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.models import VisionTransformer as TorchvisionViT

from mmsnnet.errors import DataError, SettingError
from mmsnnet.stitching import Anchor, load_pretrained
from mmsnnet.stitching.anchors.foreign_names import LIBRARIES, rename

Weights = dict[str, Tensor]
MakeAnchor = Callable[..., Anchor]


def swapped(weights: Weights, *rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Weights:
    renamed = {}
    for name, tensor in weights.items():
        for ours, theirs in rules:
            name = re.sub(ours, theirs, name)
        renamed[name] = tensor
    assert len(renamed) == len(weights)
    return renamed


def split(weights: Weights, query: str, key: str, value: str) -> Weights:
    """Split joint layers of queries, keys and values; ``names`` are the parts before ``.weight``."""
    parts = {}
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            for part, into in zip(tensor.clone().chunk(3), (query, key, value), strict=True):
                parts[name.replace("attn.qkv", into)] = part
        else:
            parts[name] = tensor
    return parts


def transformers_vit(w: Weights) -> Weights:
    """ViTModel, ViTForImageClassification's ``vit``."""
    w = split(w, *(f"attention.attention.{part}" for part in ("query", "key", "value")))
    return swapped(
        w,
        (r"^(cls_token|mask_token)", r"embeddings.\1"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^dist_token", "embeddings.distillation_token"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layer.\1.attention.output.dense"),
        (r"^blocks\.(\d+)\.norm1", r"encoder.layer.\1.layernorm_before"),
        (r"^blocks\.(\d+)\.norm2", r"encoder.layer.\1.layernorm_after"),
        (r"^blocks\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
        (r"^blocks\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
        (r"^blocks\.", "encoder.layer."),
        (r"^norm\.", "layernorm."),
    )


def vit_model(w: Weights) -> Weights:
    pooler = {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}
    return transformers_vit({k: v for k, v in w.items() if not k.startswith("head")}) | pooler


def vit_for_classification(w: Weights, base: str = "vit.", head: str = "classifier") -> Weights:
    backbone = transformers_vit({k: v for k, v in w.items() if not k.startswith("head")})
    classifier = {k.replace("head", head, 1): v for k, v in w.items() if k.startswith("head.")}
    return {base + k: v for k, v in backbone.items()} | classifier


def deit_with_teacher(w: Weights) -> Weights:
    file = vit_for_classification(w, "deit.", "cls_classifier")
    return file | {f"distillation_classifier.{kind}": w[f"head_dist.{kind}"] for kind in ("weight", "bias")}


def vit_mae(w: Weights) -> Weights:
    """ViTMAEForPreTraining, with the decoder beside the encoder."""
    decoder = {"decoder.mask_token": torch.ones(1, 1, 16), "decoder.decoder_embed.weight": torch.ones(16, 32)}
    return vit_for_classification({k: v for k, v in w.items() if not k.startswith("head")}) | decoder


def transformers_5_vit(w: Weights) -> Weights:
    """The state dict of a ViTModel of transformers 5."""
    return swapped(
        vit_model(w),
        (r"^encoder\.layer\.", "layers."),
        (r"attention\.attention\.(q|k|v)(uery|ey|alue)", r"attention.\1_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"(?<=\d\.)output\.dense", "mlp.fc2"),
    )


def transformers_dinov2(w: Weights) -> Weights:
    """Dinov2Model; ``layer_scale1`` and an MLP of two layers, or a SwiGLU."""
    w = split(w, *(f"attention.attention.{part}" for part in ("query", "key", "value")))
    return swapped(
        w,
        (r"^cls_token", "embeddings.cls_token"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layer.\1.attention.output.dense"),
        (r"^blocks\.(\d+)\.ls(\d)\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
        (r"^blocks\.", "encoder.layer."),
        (r"^norm\.", "layernorm."),
    ) | {"embeddings.mask_token": torch.ones(1, 32)}


def dinov2_swiglu(w: Weights) -> Weights:
    return swapped(transformers_dinov2(w), (r"mlp\.fc1", "mlp.weights_in"), (r"mlp\.fc2", "mlp.weights_out"))


def dinov2_with_registers(w: Weights) -> Weights:
    """Positions are added before the registers stand among the tokens; the class token has one of its own."""
    file = transformers_dinov2({k: v for k, v in w.items() if k != "reg_token"})
    of_class = torch.randn(1, 1, 32)
    file["embeddings.cls_token"] = file["embeddings.cls_token"] - of_class
    file["embeddings.position_embeddings"] = torch.cat([of_class, file["embeddings.position_embeddings"]], dim=1)
    return file | {"embeddings.register_tokens": w["reg_token"]}


def dinov2_in_chunks(w: Weights) -> Weights:
    """A run of DINOv2's training code: a block keeps its number within its chunk."""
    file = swapped(w, (r"^blocks\.(\d+)\.", lambda match: f"blocks.{match[1]}.{match[1]}."))
    return file | {"mask_token": torch.ones(1, 32)}


def transformers_dinov3(w: Weights) -> Weights:
    """DINOv3ViTModel: rotary positions, no bias of keys."""
    w = dict(w)
    if "blocks.0.attn.q_bias" not in w:
        w |= {f"blocks.{block}.attn.{part}_bias": torch.zeros(32) for block in range(2) for part in "qv"}
    w = split(w, *(f"attention.{part}_proj" for part in "qkv"))
    return swapped(
        w,
        (r"^cls_token", "embeddings.cls_token"),
        (r"^reg_token", "embeddings.register_tokens"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
        (r"attn\.(q|v)_bias", r"attention.\1_proj.bias"),
        (r"attn\.proj", "attention.o_proj"),
        (r"gamma_(\d)", r"layer_scale\1.lambda1"),
        (r"mlp\.fc1_g", "mlp.gate_proj"),
        (r"mlp\.fc1(_x)?\.", "mlp.up_proj."),
        (r"mlp\.fc2", "mlp.down_proj"),
        (r"^blocks\.", "layer."),
    ) | {"embeddings.mask_token": torch.ones(1, 1, 32)}


def dinov3_in_an_encoder(w: Weights) -> Weights:
    return swapped(transformers_dinov3(w), (r"^layer\.", "model.layer."))


def transformers_clip(w: Weights) -> Weights:
    """CLIPModel: its vision tower beside one for text, whose blocks have the same names."""
    w = split(w, *(f"self_attn.{part}_proj" for part in "qkv"))
    vision = swapped(
        w,
        (r"^cls_token", "embeddings.class_embedding"),
        (r"^pos_embed", "embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^norm_pre", "pre_layrnorm"),
        (r"^norm\.", "post_layernorm."),
        (r"attn\.proj", "self_attn.out_proj"),
        (r"\.norm(\d)", r".layer_norm\1"),
        (r"^blocks\.", "encoder.layers."),
    )
    if "embeddings.class_embedding" in vision:
        vision["embeddings.class_embedding"] = vision["embeddings.class_embedding"][0, 0]
    vision["embeddings.position_embedding.weight"] = vision["embeddings.position_embedding.weight"][0]
    vision["embeddings.position_ids"] = torch.arange(5)[None]
    text = {
        name: tensor
        for block in range(2)
        for kind, tensor in (("weight", torch.ones(8, 8)), ("bias", torch.ones(8)))
        for name in (f"encoder.layers.{block}.self_attn.q_proj.{kind}", f"encoder.layers.{block}.layer_norm1.{kind}")
    }
    named = {f"vision_model.{k}": v for k, v in vision.items()} | {f"text_model.{k}": v for k, v in text.items()}
    return named | {"logit_scale": torch.ones(()), "visual_projection.weight": torch.ones(16, 32)}


def transformers_siglip(w: Weights) -> Weights:
    """The pooling of SigLIP is an attention layer."""
    vision = {k: v for k, v in w.items() if not k.startswith(("attn_pool", "fc_norm"))}
    return transformers_clip(vision) | {"vision_model.head.probe": torch.ones(1, 1, 32)}


def mmpretrain(w: Weights) -> Weights:
    """A classifier: backbone and head."""
    backbone = swapped(
        {k: v for k, v in w.items() if not k.startswith("head")},
        (r"^patch_embed\.proj", "patch_embed.projection"),
        (r"^norm_pre", "pre_norm"),
        (r"^norm\.", "ln1."),
        (r"^fc_norm", "ln2"),
        (r"\.norm(\d)", r".ln\1"),
        (r"ls1\.gamma", "attn.gamma1.weight"),
        (r"ls2\.gamma", "ffn.gamma2.weight"),
        (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"),
        (r"^blocks\.", "layers."),
    )
    head = {k.replace("head", "head.layers.head", 1): v for k, v in w.items() if k.startswith("head.")}
    return {f"backbone.{k}": v for k, v in backbone.items()} | head


def mmpretrain_swiglu(w: Weights) -> Weights:
    return swapped(mmpretrain(w), (r"ffn\.layers\.0\.0", "ffn.w12"), (r"ffn\.layers\.1", "ffn.w3"))


def mmseg(w: Weights) -> Weights:
    """A segmentor: attention of mmcv, which wraps torch's, and a decode head."""
    file = swapped(
        mmpretrain({k: v for k, v in w.items() if not k.startswith("head")}),
        (r"attn\.qkv\.", "attn.attn.in_proj_"),
        (r"attn\.proj", "attn.attn.out_proj"),
        ("pre_norm", "ln_pre"),
    )
    return file | {"decode_head.conv_seg.weight": torch.ones(8, 32, 1, 1)}


def torchvision(w: Weights) -> Weights:
    return swapped(
        w,
        (r"^cls_token", "class_token"),
        (r"^pos_embed", "encoder.pos_embedding"),
        (r"^patch_embed\.proj", "conv_proj"),
        (r"^norm\.", "encoder.ln."),
        (r"^head\.", "heads.head."),
        (r"\.norm(\d)", r".ln_\1"),
        (r"attn\.qkv\.", "self_attention.in_proj_"),
        (r"attn\.proj", "self_attention.out_proj"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.3"),
        (r"^blocks\.", "encoder.layers.encoder_layer_"),
    )


def torchvision_as_published(w: Weights) -> Weights:
    return swapped(torchvision(w), (r"mlp\.0", "mlp.linear_1"), (r"mlp\.3", "mlp.linear_2"))


VIT = dict(model="vit_base_patch16_224")
DINOV2 = dict(model="vit_small_patch14_dinov2", patch_size=16)
REGISTERS = dict(model="vit_small_patch14_reg4_dinov2", patch_size=16)
CASES: dict[str, tuple[Callable[[Weights], Weights], dict[str, object], str]] = {
    "ViTModel": (vit_model, VIT, "transformers' ViT"),
    "ViTForImageClassification": (vit_for_classification, VIT, "transformers' ViT"),
    "ViTModel of transformers 5": (transformers_5_vit, VIT, "transformers' ViT"),
    "ViTMAE": (vit_mae, VIT, "transformers' ViT"),
    "DeiT with a teacher": (
        deit_with_teacher,
        dict(model="deit_tiny_distilled_patch16_224"),
        "transformers' ViT",
    ),
    "Dinov2Model": (transformers_dinov2, DINOV2, "transformers' DINOv2"),
    "Dinov2Model with SwiGLU": (
        dinov2_swiglu,
        dict(model="vit_giant_patch14_dinov2", patch_size=16),
        "transformers' DINOv2",
    ),
    "Dinov2WithRegistersModel": (dinov2_with_registers, REGISTERS, "transformers' DINOv2"),
    "DINOv2 in chunks": (dinov2_in_chunks, DINOV2, "DINOv2's training code"),
    "DINOv3ViTModel": (transformers_dinov3, dict(model="vit_small_patch16_dinov3_qkvb"), "transformers' DINOv3"),
    "DINOv3ViTModel with biases of zero": (
        transformers_dinov3,
        dict(model="vit_small_patch16_dinov3"),
        "transformers' DINOv3",
    ),
    "DINOv3ViTModel in an encoder": (
        dinov3_in_an_encoder,
        dict(model="vit_small_patch16_dinov3_qkvb"),
        "transformers' DINOv3",
    ),
    "DINOv3ViTModel plus": (
        transformers_dinov3,
        dict(model="vit_small_plus_patch16_dinov3_qkvb"),
        "transformers' DINOv3 with a gated MLP",
    ),
    "CLIPModel": (transformers_clip, dict(model="vit_base_patch16_clip_224"), "transformers' CLIP or SigLIP"),
    "SiglipModel": (transformers_siglip, dict(model="vit_base_patch16_siglip_224"), "transformers' CLIP or SigLIP"),
    "mmpretrain": (mmpretrain, VIT, "mmpretrain's or mmseg's VisionTransformer"),
    "mmpretrain's DeiT-III": (mmpretrain, {}, "mmpretrain's or mmseg's VisionTransformer"),
    "mmpretrain's CLIP": (
        mmpretrain,
        dict(model="vit_base_patch16_clip_224"),
        "mmpretrain's or mmseg's VisionTransformer",
    ),
    "mmpretrain's SwiGLU": (
        mmpretrain_swiglu,
        dict(model="vit_giant_patch14_dinov2", patch_size=16),
        "mmpretrain's or mmseg's VisionTransformer",
    ),
    "mmseg": (mmseg, VIT, "mmpretrain's or mmseg's VisionTransformer"),
    "mmseg's CLIP": (
        mmseg,
        dict(model="vit_base_patch16_clip_224"),
        "mmpretrain's or mmseg's VisionTransformer",
    ),
    "torchvision": (torchvision, VIT, "torchvision's VisionTransformer"),
    "torchvision as published": (torchvision_as_published, VIT, "torchvision's VisionTransformer"),
}


def last_tokens(model: VisionTransformer | Eva, images: Tensor) -> Tensor:
    """The output of the last block of a timm model."""
    actual = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: actual.append(output))
    model.forward_features(images)
    return actual[0]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_names_of_other_libraries(
    case: str, wrapped: bool, make_anchor: MakeAnchor, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    """The anchor computes the same as timm's model, and the report lists all unused tensors."""
    convert, settings, library = CASES[case]
    source, anchor = make_anchor(classifier=True, num_classes=5, **settings), make_anchor(**settings)
    file = {name: tensor.contiguous() for name, tensor in convert(source.model.state_dict()).items()}
    torch.save({"state_dict": {f"model.{k}": v for k, v in file.items()}} if wrapped else file, tmp_path / "w.pth")
    report = load_pretrained(anchor, tmp_path / "w.pth")

    assert report.library == library and f"by the names of {library}" in str(report)
    assert report.loaded == len(anchor.model.state_dict()) and not report.kept and not report.resized
    images = make_images(2, 32, 32)
    *_, (_, features) = anchor.run(anchor.stem(images))
    torch.testing.assert_close(features.data, last_tokens(source.model, images), rtol=0, atol=1e-6)
    suffixes = ("mask_token", "position_ids", "probe")
    for name in report.left_out:
        assert any(key.endswith(name) for key in file)
        unused = name.split(".")[0] in ("pooler", "classifier", "cls_classifier", "distillation_classifier", "heads")
        assert (
            unused
            or name.endswith(suffixes)
            or re.match(r"(vit\.|deit\.|backbone\.|encoder\.)?(layernorm|norm|ln|ln1|ln2|post_layernorm|head)\.", name)
            or (settings == dict(model="vit_small_patch16_dinov3") and name.endswith("_proj.bias"))
        ), name


CLASSIFIERS = ["ViTForImageClassification", "DeiT with a teacher", "mmpretrain", "torchvision"]


@pytest.mark.parametrize("case", CLASSIFIERS)
@torch.no_grad()
def test_a_classifier_comes_along(
    case: str, make_anchor: MakeAnchor, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    convert, settings, _ = CASES[case]
    source, anchor = (make_anchor(classifier=True, num_classes=5, **settings) for _ in range(2))
    torch.save(convert(source.model.state_dict()), tmp_path / "w.pth")
    report = load_pretrained(anchor, tmp_path / "w.pth")
    assert report.left_out == report.kept == ()
    images = make_images(2, 32, 32)
    torch.testing.assert_close(anchor.model(images), source.model(images), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_model_that_torchvision_made(
    make_anchor: MakeAnchor, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    theirs = TorchvisionViT(32, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128, num_classes=5).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.1)
    anchor, images = make_anchor(classifier=True, num_classes=5, **VIT), make_images(2, 32, 32)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    load_pretrained(anchor, tmp_path / "w.pth")
    torch.testing.assert_close(anchor.model(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_a_rectangle_below_other_names(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """Positions are resampled under every library's name; one shared name does not change the library."""
    source = make_anchor(img_size=64, **VIT)
    torch.save(vit_model(source.model.state_dict()), tmp_path / "w.pth")
    report = load_pretrained(make_anchor(img_size=(32, 96), **VIT), tmp_path / "w.pth")
    assert report.resized == ("pos_embed",)


# What does not fit


@pytest.mark.parametrize("case", ["ViTModel", "Dinov2Model", "mmpretrain", "torchvision", "CLIPModel"])
def test_a_tensor_that_lacks(case: str, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    convert, settings, _ = CASES[case]
    file = convert(make_anchor(**settings).model.state_dict())
    last = [name for name in file if re.search(r"(query|q_proj|qkv|in_proj_)\.?weight", name) and "text" not in name][
        -1
    ]
    torch.save({name: tensor for name, tensor in file.items() if name != last}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"missing: blocks\.1\.attn\.qkv\.weight"):
        load_pretrained(make_anchor(**settings), tmp_path / "w.pth")


def test_parts_of_a_layer_in_unlike_shapes(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    file = vit_model(make_anchor(**VIT).model.state_dict())
    for shape in ((), (3,), (32, 7)):
        file["encoder.layer.0.attention.attention.key.weight"] = torch.ones(shape)
        torch.save(file, tmp_path / "w.pth")
        with pytest.raises(DataError, match=r"blocks\.0\.attn\.(qkv|k)\.weight"):
            load_pretrained(make_anchor(**VIT), tmp_path / "w.pth")


def test_a_bias_of_queries_is_not_dropped(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    file = transformers_dinov3(make_anchor(model="vit_small_patch16_dinov3_qkvb").model.state_dict())
    torch.save(file, tmp_path / "w.pth")
    with pytest.raises(SettingError, match=r"layer\.0\.attention\.q_proj\.bias.*_qkvb"):
        load_pretrained(make_anchor(model="vit_small_patch16_dinov3"), tmp_path / "w.pth")


def test_no_library_is_taken_for_another() -> None:
    for library in LIBRARIES:
        for mark in library.marks:
            actual = rename({mark: torch.zeros(1)})
            assert actual is not None and actual.library is library
    assert rename({"blocks.0.attn.qkv.weight": torch.zeros(1), "cls_token": torch.zeros(1)}) is None
