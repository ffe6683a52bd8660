"""Stitching of vision transformers, with PyTorch and timm alone: OpenMMLab is not needed."""

from mmsnnet.stitching.anchors.base import Anchor, Component
from mmsnnet.stitching.anchors.factory import create_anchor
from mmsnnet.stitching.anchors.pretrained import LoadReport, load_pretrained
from mmsnnet.stitching.cost import Cost, CostModel, cost_model, count_flops
from mmsnnet.stitching.factory import create_stitched
from mmsnnet.stitching.features import Features, Layout
from mmsnnet.stitching.least_squares import NormalEquations, solve_normal_equations
from mmsnnet.stitching.network import StitchedNetwork
from mmsnnet.stitching.prefix import PrefixPlan, SharedPrefixes, prefix_order
from mmsnnet.stitching.refinement import Refinement
from mmsnnet.stitching.sampling import StitchSampler, flops_bins, spread
from mmsnnet.stitching.space import StitchSpace, UnknownStitchError
from mmsnnet.stitching.stitch import LayerKey, Segment, Stitch, Tap
from mmsnnet.stitching.stitching_layer import StitchingLayer

__all__ = [
    "Anchor",
    "Component",
    "Cost",
    "CostModel",
    "Features",
    "LayerKey",
    "Layout",
    "LoadReport",
    "NormalEquations",
    "PrefixPlan",
    "Refinement",
    "Segment",
    "SharedPrefixes",
    "Stitch",
    "StitchSampler",
    "StitchSpace",
    "StitchedNetwork",
    "StitchingLayer",
    "Tap",
    "UnknownStitchError",
    "cost_model",
    "count_flops",
    "create_anchor",
    "create_stitched",
    "flops_bins",
    "load_pretrained",
    "prefix_order",
    "solve_normal_equations",
    "spread",
]
