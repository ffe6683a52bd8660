"""Tables that translate other libraries' names of ViT weights to timm's names.

timm's filters know the names of the papers' code (DeiT-III, CLIP, DINOv2, EVA-02, ...). The tables here translate to
names that those filters know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Library:
    """The names of one library.

    Attributes:
        name: the library's name in messages.
        marks: names that identify the library; one of them is enough.
        names: the library's names and timm's name for each; None for a tensor that timm's model lacks. ``N`` stands for
            the number of a block, ``C`` for the number of a chunk of blocks, ``*`` for weight or bias, ``**`` for any
            ending.
        towers: optional prefixes, which names have if the library stores a classifier beside the backbone.
        optional: timm's names of biases that the library may lack; a missing bias is zero.
    """

    name: str
    marks: tuple[str, ...]
    names: Mapping[str, str | None]
    towers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    patterns: tuple[tuple[re.Pattern[str], str | None], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tower = f"(?:{'|'.join(map(re.escape, self.towers))})?"
        patterns = []
        for theirs, ours in self.names.items():
            pattern = re.escape(theirs).replace("N", r"(?P<block>\d+)").replace("C", r"\d+")
            pattern = pattern.replace(r"\*\*", "(?P<end>.+)").replace(r"\*", "(?P<end>weight|bias)")
            patterns.append((re.compile(tower + pattern), ours and ours.replace("**", "*")))
        object.__setattr__(self, "patterns", tuple(patterns))

    def knows(self, weights: Mapping[str, object]) -> bool:
        """Whether weights have names of this library."""
        return any(tower + mark in weights for tower in ("", *self.towers) for mark in self.marks)

    def translate(self, name: str) -> str | None:
        """Translate a name to timm's name.

        The result is None for a tensor that timm's model lacks. An unknown name stays unchanged.
        """
        for pattern, ours in self.patterns:
            if match := pattern.fullmatch(name):
                parts = match.groupdict()
                return ours and ours.replace("N", parts.get("block", "")).replace("*", parts.get("end", ""))
        return name


# transformers has separate layers for queries, keys and values; ``rename`` joins attn.q, attn.k and attn.v.
TRANSFORMERS_EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.*": "patch_embed.proj.*",
}
TRANSFORMERS_ATTENTION = {
    "encoder.layer.N.attention.attention.query.*": "blocks.N.attn.q.*",
    "encoder.layer.N.attention.attention.key.*": "blocks.N.attn.k.*",
    "encoder.layer.N.attention.attention.value.*": "blocks.N.attn.v.*",
    "encoder.layer.N.attention.output.dense.*": "blocks.N.attn.proj.*",
    "layernorm.*": "norm.*",
}
# The block names of a ViTModel of transformers 5. Its save_pretrained writes the names above.
TRANSFORMERS_5_VIT = {
    "layers.N.layernorm_before.*": "blocks.N.norm1.*",
    "layers.N.attention.q_proj.*": "blocks.N.attn.q.*",
    "layers.N.attention.k_proj.*": "blocks.N.attn.k.*",
    "layers.N.attention.v_proj.*": "blocks.N.attn.v.*",
    "layers.N.attention.o_proj.*": "blocks.N.attn.proj.*",
    "layers.N.layernorm_after.*": "blocks.N.norm2.*",
    "layers.N.mlp.fc1.*": "blocks.N.mlp.fc1.*",
    "layers.N.mlp.fc2.*": "blocks.N.mlp.fc2.*",
}
TRANSFORMERS_DINOV3 = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.mask_token": None,
    "embeddings.patch_embeddings.*": "patch_embed.proj.*",
    "layer.N.norm1.*": "blocks.N.norm1.*",
    "layer.N.attention.q_proj.*": "blocks.N.attn.q.*",
    "layer.N.attention.k_proj.*": "blocks.N.attn.k.*",
    "layer.N.attention.v_proj.*": "blocks.N.attn.v.*",
    "layer.N.attention.o_proj.*": "blocks.N.attn.proj.*",
    "layer.N.layer_scale1.lambda1": "blocks.N.gamma_1",
    "layer.N.norm2.*": "blocks.N.norm2.*",
    "layer.N.mlp.down_proj.*": "blocks.N.mlp.fc2.*",
    "layer.N.layer_scale2.lambda1": "blocks.N.gamma_2",
}

LIBRARIES = (
    Library(
        "transformers' ViT",
        marks=("encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight"),
        names={
            **TRANSFORMERS_EMBEDDINGS,
            "embeddings.distillation_token": "dist_token",
            "embeddings.mask_token": None,
            "encoder.layer.N.layernorm_before.*": "blocks.N.norm1.*",
            **TRANSFORMERS_ATTENTION,
            "encoder.layer.N.layernorm_after.*": "blocks.N.norm2.*",
            "encoder.layer.N.intermediate.dense.*": "blocks.N.mlp.fc1.*",
            "encoder.layer.N.output.dense.*": "blocks.N.mlp.fc2.*",
            **TRANSFORMERS_5_VIT,
            "pooler.dense.*": None,
            "classifier.*": "head.*",
            "cls_classifier.*": "head.*",
            "distillation_classifier.*": "head_dist.*",
        },
        towers=("vit.", "deit."),
    ),
    Library(
        "transformers' DINOv2",
        marks=("encoder.layer.0.layer_scale1.lambda1",),
        names={
            **TRANSFORMERS_EMBEDDINGS,
            "embeddings.mask_token": "mask_token",
            "embeddings.register_tokens": "register_tokens",
            "encoder.layer.N.norm1.*": "blocks.N.norm1.*",
            **TRANSFORMERS_ATTENTION,
            "encoder.layer.N.layer_scale1.lambda1": "blocks.N.ls1.gamma",
            "encoder.layer.N.norm2.*": "blocks.N.norm2.*",
            "encoder.layer.N.mlp.fc1.*": "blocks.N.mlp.fc1.*",
            "encoder.layer.N.mlp.fc2.*": "blocks.N.mlp.fc2.*",
            "encoder.layer.N.mlp.weights_in.*": "blocks.N.mlp.fc1.*",
            "encoder.layer.N.mlp.weights_out.*": "blocks.N.mlp.fc2.*",
            "encoder.layer.N.layer_scale2.lambda1": "blocks.N.ls2.gamma",
        },
    ),
    Library(
        "transformers' DINOv3 with a gated MLP",
        marks=("layer.0.mlp.gate_proj.weight",),
        names={
            **TRANSFORMERS_DINOV3,
            "layer.N.mlp.gate_proj.*": "blocks.N.mlp.fc1_g.*",
            "layer.N.mlp.up_proj.*": "blocks.N.mlp.fc1_x.*",
        },
        towers=("model.",),
    ),
    Library(
        "transformers' DINOv3",
        marks=("layer.0.layer_scale1.lambda1",),
        names={**TRANSFORMERS_DINOV3, "layer.N.mlp.up_proj.*": "blocks.N.mlp.fc1.*"},
        towers=("model.",),
    ),
    Library(
        "transformers' CLIP or SigLIP",
        marks=("embeddings.patch_embedding.weight",),
        names={
            "embeddings.class_embedding": "cls_token",
            "embeddings.position_embedding.weight": "pos_embed",
            "embeddings.position_ids": None,
            "embeddings.patch_embedding.*": "patch_embed.proj.*",
            "pre_layrnorm.*": "norm_pre.*",  # this is the library's spelling
            "encoder.layers.N.layer_norm1.*": "blocks.N.norm1.*",
            "encoder.layers.N.self_attn.q_proj.*": "blocks.N.attn.q.*",
            "encoder.layers.N.self_attn.k_proj.*": "blocks.N.attn.k.*",
            "encoder.layers.N.self_attn.v_proj.*": "blocks.N.attn.v.*",
            "encoder.layers.N.self_attn.out_proj.*": "blocks.N.attn.proj.*",
            "encoder.layers.N.layer_norm2.*": "blocks.N.norm2.*",
            "encoder.layers.N.mlp.fc1.*": "blocks.N.mlp.fc1.*",
            "encoder.layers.N.mlp.fc2.*": "blocks.N.mlp.fc2.*",
            "post_layernorm.*": "norm.*",
        },
    ),
    Library(
        "mmpretrain's or mmseg's VisionTransformer",
        marks=("layers.0.ffn.layers.0.0.weight", "layers.0.ffn.w12.weight"),
        names={
            "patch_embed.projection.*": "patch_embed.proj.*",
            "pre_norm.*": "norm_pre.*",
            "ln_pre.*": "norm_pre.*",
            "layers.N.ln1.*": "blocks.N.norm1.*",
            "layers.N.attn.qkv.*": "blocks.N.attn.qkv.*",
            "layers.N.attn.proj.*": "blocks.N.attn.proj.*",
            "layers.N.attn.attn.in_proj_weight": "blocks.N.attn.qkv.weight",
            "layers.N.attn.attn.in_proj_bias": "blocks.N.attn.qkv.bias",
            "layers.N.attn.attn.out_proj.*": "blocks.N.attn.proj.*",
            "layers.N.attn.gamma1.weight": "blocks.N.ls1.gamma",
            "layers.N.ln2.*": "blocks.N.norm2.*",
            "layers.N.ffn.layers.0.0.*": "blocks.N.mlp.fc1.*",
            "layers.N.ffn.layers.1.*": "blocks.N.mlp.fc2.*",
            "layers.N.ffn.w12.*": "blocks.N.mlp.fc1.*",
            "layers.N.ffn.w3.*": "blocks.N.mlp.fc2.*",
            "layers.N.ffn.gamma2.weight": "blocks.N.ls2.gamma",
            "cls_token": "cls_token",
            "dist_token": "dist_token",
            "pos_embed": "pos_embed",
            "ln1.*": "norm.*",
            "ln2.*": "fc_norm.*",
            "head.layers.head.*": "head.*",
            "head.layers.head_dist.*": "head_dist.*",
            "head.fc.*": "head.*",
        },
        towers=("backbone.",),
        optional=("patch_embed.proj.bias",),  # mmseg's patch_bias is False by default
    ),
    Library(
        "torchvision's VisionTransformer",
        marks=("encoder.layers.encoder_layer_0.self_attention.in_proj_weight",),
        names={
            "class_token": "cls_token",
            "conv_proj.*": "patch_embed.proj.*",
            "encoder.pos_embedding": "pos_embed",
            "encoder.layers.encoder_layer_N.ln_1.*": "blocks.N.norm1.*",
            "encoder.layers.encoder_layer_N.self_attention.in_proj_weight": "blocks.N.attn.qkv.weight",
            "encoder.layers.encoder_layer_N.self_attention.in_proj_bias": "blocks.N.attn.qkv.bias",
            "encoder.layers.encoder_layer_N.self_attention.out_proj.*": "blocks.N.attn.proj.*",
            "encoder.layers.encoder_layer_N.ln_2.*": "blocks.N.norm2.*",
            "encoder.layers.encoder_layer_N.mlp.0.*": "blocks.N.mlp.fc1.*",
            "encoder.layers.encoder_layer_N.mlp.3.*": "blocks.N.mlp.fc2.*",
            "encoder.layers.encoder_layer_N.mlp.linear_1.*": "blocks.N.mlp.fc1.*",  # in torchvision's published files
            "encoder.layers.encoder_layer_N.mlp.linear_2.*": "blocks.N.mlp.fc2.*",
            "encoder.ln.*": "norm.*",
            "heads.head.*": "head.*",
        },
    ),
    # Blocks in a chunk keep their number in the model. timm knows all other names.
    Library("DINOv2's training code", marks=("blocks.0.0.norm1.weight",), names={"blocks.C.N.**": "blocks.N.**"}),
)

PART = re.compile(r"(blocks\.\d+\.attn\.)([qkv])\.(weight|bias)")


@dataclass(frozen=True)
class Renamed:
    """Weights under names that timm's filters know.

    Attributes:
        library: the library whose names were translated.
        weights: the weights, by their new names.
        origins: the file's names for each new name.
        unused: the file's names of tensors that no timm model has.
    """

    library: Library
    weights: dict[str, Tensor]
    origins: dict[str, tuple[str, ...]]
    unused: tuple[str, ...]


def rename(weights: Mapping[str, Tensor]) -> Renamed | None:
    """Translate the names of weights; return None if no library in ``LIBRARIES`` has such names."""
    library = next((one for one in LIBRARIES if one.knows(weights)), None)
    if library is None:
        return None
    renamed: dict[str, Tensor] = {}
    origins: dict[str, tuple[str, ...]] = {}
    unused = []
    for name, tensor in weights.items():
        ours = library.translate(name)
        if ours is None:
            unused.append(name)
            continue
        if ours in ("cls_token", "pos_embed") and 0 < tensor.ndim < 3:  # CLIP's tensors have no batch dimension
            tensor = tensor.reshape(1, -1, tensor.shape[-1])
        renamed[ours], origins[ours] = tensor, (name,)
    return _join(Renamed(library, renamed, origins, tuple(unused)))


def _join(renamed: Renamed) -> Renamed:
    """Concatenate the layers of queries, keys and values to timm's one layer.

    DINOv3's keys have no bias, so a missing key bias is zero.
    """
    layers: dict[tuple[str, str], dict[str, str]] = {}
    for name in renamed.weights:
        if match := PART.fullmatch(name):
            layers.setdefault((match[1], match[3]), {})[match[2]] = name
    weights, origins = dict(renamed.weights), dict(renamed.origins)
    for (attention, tensor), names in layers.items():
        if set(names) != set("qkv") and not (tensor == "bias" and set(names) == set("qv")):
            continue  # an incomplete layer keeps its names, so that the error lists them
        parts = {part: weights.pop(name) for part, name in names.items()}
        parts.setdefault("k", torch.zeros_like(parts["q"]))
        joined = f"{attention}qkv.{tensor}"
        if len({part.shape[1:] for part in parts.values()}) == 1 and parts["q"].ndim:
            weights[joined] = torch.cat([parts[part] for part in "qkv"])
        origins[joined] = tuple(source for name in names.values() for source in origins.pop(name))
    return Renamed(renamed.library, weights, origins, renamed.unused)
