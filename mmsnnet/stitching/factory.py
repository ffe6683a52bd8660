"""Build a stitched network in one line, from names of timm models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from mmsnnet.stitching.anchors.factory import create_anchor
from mmsnnet.stitching.anchors.pretrained import load_pretrained
from mmsnnet.stitching.least_squares import NormalEquations
from mmsnnet.stitching.network import StitchedNetwork
from mmsnnet.stitching.space import StitchSpace


def create_stitched(
    *models: str,
    img_size: int | tuple[int, int],
    pretrained: bool | str | Sequence[str] = False,
    init_from: Tensor | Iterable[Tensor] | None = None,
    scheme: str = "two_way",
    rank: int = 16,
    **kwargs: Any,
) -> StitchedNetwork:
    """Build a stitched network::

        network = create_stitched("deit3_small_patch16_224", "deit3_large_patch16_224", img_size=224)
        (features,) = network(images, network.space["S7-L16"], out_indices=(23,))

    Args:
        models: names of timm models of one family, smallest first.
        img_size: height and width of the images, or the side.
        pretrained: True loads the weights that timm publishes, False leaves random weights. A sequence has one source
            for each model, as :func:`load_pretrained` takes it.
        init_from: normalised images (B, 3, H, W), or batches of them, for the least-squares initialisation of the
            stitching layers. Without images, the layers have random weights: load a checkpoint, or use
            :class:`NormalEquations`.
        scheme: ``'two_way'`` (SN-Netv2), ``'one_way'`` or ``'sliding_window'`` (SN-Net).
        rank: rank of the low-rank updates of the stitching layers; 0 trains the layers' full weights.
        kwargs: further arguments of :func:`create_anchor` for all anchors: ``classifier=True``, ``window_size``, or
            arguments of ``timm.create_model``.

    Raises:
        ValueError, TypeError: a model is unknown, has no adapter or does not fit the others; the number of sources
            differs from the number of models; or ``init_from`` is no such images.
    """
    sources: list[str | bool] = [pretrained] if isinstance(pretrained, str | bool) else [*pretrained]
    if isinstance(pretrained, bool):
        sources *= len(models)
    if len(sources) != len(models):
        raise ValueError(f"pretrained is True, False or one source for each of {len(models)} models; got {sources}")
    anchors = [create_anchor(model, img_size, **kwargs) for model in models]
    space = StitchSpace.of(scheme, [anchor.stages for anchor in anchors])
    network = StitchedNetwork(anchors, space, rank=rank)
    for anchor, source in zip(anchors, sources, strict=True):
        if source:
            load_pretrained(anchor, source)
    if init_from is not None and space.layers:
        equations = NormalEquations(network)
        for images in [init_from] if isinstance(init_from, Tensor) else init_from:
            equations.add(images)
        equations.solve()
    return network
