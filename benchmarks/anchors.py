"""The tables of docs/anchors.md: models of timm that are stitched, and the costs of each space.

Each row is built at its real size, with uninitialised weights. FLOPs are multiply-accumulates, as fvcore counts them,
of the backbone for an image of 512 x 512, with one tap at the last block. tests/stitching/anchors/test_families.py
compares each model of `FAMILIES` with timm's forward.

    python benchmarks/anchors.py
"""

import argparse
from dataclasses import dataclass

import timm
import torch

from mmsnnet.stitching import StitchedNetwork, StitchSpace, cost_model, create_anchor

SIZE = 512
NORMALISATIONS = {  # of images in [0, 1], by their name in the table
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Family:
    """A row of the table: models of timm, smallest first, and a patch size; None keeps each model's."""

    name: str
    models: tuple[str, ...]
    patch_size: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The other arguments of ``create_anchor``."""
        return {} if self.patch_size is None else dict(patch_size=self.patch_size)


FAMILIES = (
    Family("DeiT", ("deit_tiny_patch16_224.fb_in1k", "deit_base_patch16_224.fb_in1k")),
    Family("DeiT, distilled", ("deit_small_distilled_patch16_224.fb_in1k", "deit_base_distilled_patch16_224.fb_in1k")),
    Family("DeiT-III", ("deit3_small_patch16_224.fb_in22k_ft_in1k", "deit3_large_patch16_224.fb_in22k_ft_in1k")),
    Family("DeiT-III", ("deit3_base_patch16_224.fb_in22k_ft_in1k", "deit3_large_patch16_224.fb_in22k_ft_in1k")),
    Family(
        "DeiT-III",
        (
            "deit3_small_patch16_224.fb_in22k_ft_in1k",
            "deit3_base_patch16_224.fb_in22k_ft_in1k",
            "deit3_large_patch16_224.fb_in22k_ft_in1k",
        ),
    ),
    Family("DeiT-III", ("deit3_large_patch16_224.fb_in1k", "deit3_huge_patch14_224.fb_in1k"), patch_size=16),
    Family(
        "AugReg, ImageNet-21k",
        (
            "vit_tiny_patch16_224.augreg_in21k",
            "vit_small_patch16_224.augreg_in21k",
            "vit_base_patch16_224.augreg_in21k",
        ),
    ),
    Family("AugReg, ImageNet-21k", ("vit_small_patch16_224.augreg_in21k", "vit_large_patch16_224.augreg_in21k")),
    Family("AugReg, ImageNet-21k", ("vit_small_patch32_224.augreg_in21k", "vit_base_patch32_224.augreg_in21k")),
    Family("MAE", ("vit_base_patch16_224.mae", "vit_large_patch16_224.mae")),
    Family(
        "CLIP, OpenAI",
        ("vit_base_patch16_clip_quickgelu_224.openai", "vit_large_patch14_clip_quickgelu_224.openai"),
        16,
    ),
    Family("CLIP, DataComp", ("vit_base_patch16_clip_224.datacompxl", "vit_large_patch14_clip_224.datacompxl"), 16),
    Family("CLIP, LAION-2B", ("vit_huge_patch14_clip_224.laion2b", "vit_giant_patch14_clip_224.laion2b")),
    Family("CLIP, DFN", ("vit_large_patch14_clip_quickgelu_224.dfn2b", "vit_huge_patch14_clip_quickgelu_224.dfn5b")),
    Family("SigLIP 2", ("vit_base_patch16_siglip_512.v2_webli", "vit_large_patch16_siglip_512.v2_webli")),
    Family("SigLIP 2", ("vit_large_patch16_siglip_512.v2_webli", "vit_so400m_patch16_siglip_512.v2_webli")),
    Family("DINO", ("vit_small_patch16_224.dino", "vit_base_patch16_224.dino")),
    Family("DINOv2", ("vit_small_patch14_dinov2.lvd142m", "vit_large_patch14_dinov2.lvd142m")),
    Family("DINOv2", ("vit_large_patch14_dinov2.lvd142m", "vit_giant_patch14_dinov2.lvd142m")),
    Family("DINOv2, registers", ("vit_small_patch14_reg4_dinov2.lvd142m", "vit_large_patch14_reg4_dinov2.lvd142m")),
    Family("DINOv2, registers", ("vit_base_patch14_reg4_dinov2.lvd142m", "vit_giant_patch14_reg4_dinov2.lvd142m")),
    Family("TIPSv2", ("vit_base_patch14_reg1_tipsv2.webli", "vit_large_patch14_reg1_tipsv2.webli")),
    Family("BEiT-3", ("beit3_base_patch16_224.pt", "beit3_large_patch16_224.pt")),
    Family("AIMv2", ("aimv2_large_patch14_224.apple_pt", "aimv2_huge_patch14_224.apple_pt")),
    Family("timm's SBB", ("vit_medium_patch16_reg4_gap_256.sbb_in12k", "vit_betwixt_patch16_reg4_gap_256.sbb_in12k")),
    Family("EVA-02", ("eva02_tiny_patch14_224.mim_in22k", "eva02_base_patch14_224.mim_in22k")),
    Family("EVA-02", ("eva02_small_patch14_224.mim_in22k", "eva02_large_patch14_224.mim_in22k")),
    Family("EVA-02 CLIP", ("eva02_base_patch16_clip_224.merged2b", "eva02_large_patch14_clip_224.merged2b"), 16),
    Family("DINOv3", ("vit_small_patch16_dinov3.lvd1689m", "vit_large_patch16_dinov3.lvd1689m")),
    Family("DINOv3", ("vit_small_plus_patch16_dinov3.lvd1689m", "vit_base_patch16_dinov3.lvd1689m")),
    Family(
        "DINOv3",
        (
            "vit_small_patch16_dinov3.lvd1689m",
            "vit_base_patch16_dinov3.lvd1689m",
            "vit_large_patch16_dinov3.lvd1689m",
        ),
    ),
    Family("DINOv3", ("vit_large_patch16_dinov3.lvd1689m", "vit_huge_plus_patch16_dinov3.lvd1689m")),
    Family(
        "EUPE",
        (
            "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
            "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m",
            "vit_base_patch16_dinov3_qkvb.eupe_lvd1689m",
        ),
    ),
    Family("LingBot-Vision", ("vit_small_patch16_lingbot.robbyant", "vit_large_patch16_lingbot.robbyant")),
    Family("RoPE-ViT, axial", ("vit_small_patch16_rope_224.naver_in1k", "vit_large_patch16_rope_224.naver_in1k")),
    Family(
        "RoPE-ViT, mixed",
        ("vit_small_patch16_rope_mixed_224.naver_in1k", "vit_large_patch16_rope_mixed_224.naver_in1k"),
    ),
    Family(
        "PE Spatial",
        (
            "vit_pe_spatial_tiny_patch16_512.fb",
            "vit_pe_spatial_small_patch16_512.fb",
            "vit_pe_spatial_base_patch16_512.fb",
        ),
    ),
)


def build(family: Family) -> StitchedNetwork:
    """The network of a row at its real size, with uninitialised weights."""
    with torch.device("meta"):
        anchors = [create_anchor(model, SIZE, **family.options) for model in family.models]
        network = StitchedNetwork(anchors, StitchSpace.two_way([anchor.depth for anchor in anchors]))
    network.to_empty(device="cpu")
    for buffer in network.buffers():
        buffer.zero_()
    return network


def normalisation(model: str) -> str:
    """The normalisation that a model of timm was trained with, as a key of `NORMALISATIONS`."""
    config = timm.get_pretrained_cfg(model)
    return next(name for name, values in NORMALISATIONS.items() if values == (config.mean, config.std))


def row(family: Family) -> str:
    """A row of the table, in Markdown."""
    network = build(family)
    anchors = [network.anchor(index) for index in range(len(family.models))]
    first, last = anchors[0], anchors[-1]
    costs = cost_model(network, (SIZE, SIZE))
    flops = [costs.stitch(stitch, (last.depth - 1,)).flops / 1e9 for stitch in network.space]
    return line(
        family.name,
        ", ".join(f"`{model}`" for model in family.models),
        type(first.model).__name__,
        f"{first.patch_size[0]}" if family.patch_size is None else f"{first.patch_size[0]}, set",
        first.layout().prefix,
        ", ".join(str(anchor.width) for anchor in anchors),
        ", ".join(str(anchor.depth) for anchor in anchors),
        len(network.space),
        f"{min(flops):.1f} - {max(flops):.1f}",
        f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f}",
        " and ".join(dict.fromkeys(normalisation(model) for model in family.models)),
        " and ".join(dict.fromkeys(timm.get_pretrained_cfg(model).license for model in family.models)),
    )


def normalisation_row(name: str) -> str:
    """Mean and deviation of a normalisation for pixels from 0 to 255, for a data preprocessor."""
    return line(name, *(", ".join(str(round(255 * value, 4)) for value in values) for values in NORMALISATIONS[name]))


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    headings = "family", "models", "timm class", "patch", "prefix tokens", "widths", "depths", "stitches"
    headings += "GFLOPs at 512", "parameters (M)", "normalisation", "licence"
    print(line(*headings), line(*["---"] * len(headings)), sep="\n")
    for family in FAMILIES:
        print(row(family), flush=True)
    print("", line("normalisation", "mean", "std"), line(*["---"] * 3), sep="\n")
    print(*map(normalisation_row, NORMALISATIONS), sep="\n")


if __name__ == "__main__":
    main()
