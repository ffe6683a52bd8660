"""The tables of docs/anchors.md: models of timm that are stitched, and the costs of each space.

Each row is built at its real size. FLOPs are multiply-accumulates, as fvcore counts them. Those of plain ViTs are of
the backbone for an image of 512 x 512, with one tap at the last block. tests/stitching/anchors/test_families.py
compares each model of `FAMILIES` with timm's forward.

Those of hierarchical models are of the classifier at the size of the weights. Each pair of `STAGED` has random weights,
and classifies an image along one route that crosses in each stage, in each scheme and direction.

    python benchmarks/anchors.py [--staged]
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import timm
import torch

from mmsnnet.stitching import Stitch, StitchedNetwork, StitchSpace, cost_model, create_anchor

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


@dataclass(frozen=True)
class StagedPair:
    """A row of the table of hierarchical models: two models of timm, the smaller first, and the side of images."""

    name: str
    models: tuple[str, str]
    size: int = 224


STAGED = (
    StagedPair("Swin", ("swin_tiny_patch4_window7_224.ms_in1k", "swin_small_patch4_window7_224.ms_in1k")),
    StagedPair("Swin V2", ("swinv2_tiny_window8_256.ms_in1k", "swinv2_small_window8_256.ms_in1k"), 256),
    StagedPair("ConvNeXt", ("convnext_tiny.fb_in1k", "convnext_small.fb_in1k")),
    StagedPair("ConvNeXt V2", ("convnextv2_atto.fcmae_ft_in1k", "convnextv2_femto.fcmae_ft_in1k")),
    StagedPair("ResNet", ("resnet18.a1_in1k", "resnet34.a1_in1k")),
    StagedPair("ResNet", ("resnet34.a1_in1k", "resnet50.a1_in1k")),
    StagedPair("ResNet", ("resnet18.tv_in1k", "resnet50.a1_in1k")),
    StagedPair("ResNeXt", ("resnext50_32x4d.fb_ssl_yfcc100m_ft_in1k", "resnext101_32x4d.fb_ssl_yfcc100m_ft_in1k")),
    StagedPair("ResNet V2", ("resnetv2_50.a1h_in1k", "resnetv2_101.a1h_in1k")),
    StagedPair("RegNetY", ("regnety_002.pycls_in1k", "regnety_004.pycls_in1k")),
    StagedPair("EfficientNet", ("efficientnet_b0.ra_in1k", "efficientnet_b1.ft_in1k")),
    StagedPair("MobileNetV3", ("mobilenetv3_small_075.lamb_in1k", "mobilenetv3_small_100.lamb_in1k")),
    StagedPair("PVT v2", ("pvt_v2_b1.in1k", "pvt_v2_b2.in1k")),
    StagedPair("CAFormer", ("caformer_s18.sail_in1k", "caformer_s36.sail_in1k")),
    StagedPair("PoolFormer v2", ("poolformerv2_s12.sail_in1k", "poolformerv2_s24.sail_in1k")),
    StagedPair("MambaOut", ("mambaout_femto.in1k", "mambaout_kobe.in1k")),
    StagedPair("LeViT", ("levit_192.fb_dist_in1k", "levit_256.fb_dist_in1k")),
    StagedPair("ResNet to Swin", ("resnet18.tv_in1k", "swin_tiny_patch4_window7_224.ms_in1k")),
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


def staged_row(pair: StagedPair) -> str:
    """A row of the table of hierarchical models, in Markdown. Its routes have run, see :func:`run_crossings`."""
    networks = staged_networks(pair)
    for network in networks.values():
        run_crossings(network, pair.size)
    anchors = [networks["two_way"].anchor(index) for index in range(2)]
    costs = cost_model(networks["two_way"], (pair.size, pair.size)).stitches(None)
    flops = [cost.flops / 1e9 for cost in costs.values()]
    return line(
        pair.name,
        ", ".join(f"`{model}`" for model in pair.models),
        ", ".join(dict.fromkeys(type(anchor.model).__name__ for anchor in anchors)),
        ", ".join(" ".join(map(str, anchor.stages)) for anchor in anchors),
        ", ".join(" ".join(str(anchor.widths[end - 1]) for end in accumulate(anchor.stages)) for anchor in anchors),
        *(len(network.space) for network in networks.values()),
        pair.size,
        f"{min(flops):.2f} - {max(flops):.2f}",
        " and ".join(dict.fromkeys(normalisation(model) for model in pair.models)),
        " and ".join(dict.fromkeys(timm.get_pretrained_cfg(model).license for model in pair.models)),
    )


def staged_networks(pair: StagedPair) -> dict[str, StitchedNetwork]:
    """The network of a pair in each scheme, with random weights; the anchors are the same ones."""
    anchors = [create_anchor(model, pair.size, classifier=True).eval() for model in pair.models]
    stages = [anchor.stages for anchor in anchors]
    # No window slides over a stage in which the larger anchor has fewer blocks.
    skip = [stage for stage, (small, large) in enumerate(zip(*stages, strict=True)) if small > large]
    spaces = StitchSpace.two_way(stages), StitchSpace.one_way(stages), StitchSpace.sliding_window(stages, skip)
    return {space.scheme: StitchedNetwork(anchors, space, rank=0).eval() for space in spaces}


@torch.inference_mode()
def run_crossings(network: StitchedNetwork, size: int) -> set[int]:
    """Classify an image along one route for each stage and direction of a crossing; returns the stages.

    Raises:
        ValueError: the logits of a route are not finite.
    """
    image = torch.randn(1, 3, size, size)
    first: dict[tuple[int, int], Stitch] = {}
    for stitch in network.space:
        for crossing in crossings(network.space, stitch):
            first.setdefault(crossing, stitch)
    for stitch in dict.fromkeys(first.values()):
        if not network.classify(image, stitch).isfinite().all():
            raise ValueError(f"stitch {stitch} gives logits that are not finite")
    return {stage for _, stage in first}


def crossings(space: StitchSpace, stitch: Stitch) -> Iterator[tuple[int, int]]:
    """The anchor and the stage that a route leaves, for each of its crossings."""
    for segment in stitch.segments[:-1]:
        ends = accumulate(space.stages[segment.anchor])
        yield segment.anchor, next(stage for stage, end in enumerate(ends) if segment.stop <= end)


def normalisation_row(name: str) -> str:
    """Mean and deviation of a normalisation for pixels from 0 to 255, for a data preprocessor."""
    return line(name, *(", ".join(str(round(255 * value, 4)) for value in values) for values in NORMALISATIONS[name]))


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--staged", action="store_true", help="print the table of hierarchical models")
    if parser.parse_args().staged:
        headings = "family", "models", "timm class", "blocks", "widths", "two-way", "one-way", "sliding window"
        headings += "size", "GFLOPs", "normalisation", "licence"
        print(line(*headings), line(*["---"] * len(headings)), sep="\n")
        for pair in STAGED:
            print(staged_row(pair), flush=True)
        return
    headings = "family", "models", "timm class", "patch", "prefix tokens", "widths", "depths", "stitches"
    headings += "GFLOPs at 512", "parameters (M)", "normalisation", "licence"
    print(line(*headings), line(*["---"] * len(headings)), sep="\n")
    for family in FAMILIES:
        print(row(family), flush=True)
    print("", line("normalisation", "mean", "std"), line(*["---"] * 3), sep="\n")
    print(*map(normalisation_row, NORMALISATIONS), sep="\n")


if __name__ == "__main__":
    main()
