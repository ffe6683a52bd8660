"""Choose the stitches that training draws; the space keeps all of them, with their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmsnnet.errors import SettingError, check_keys
from mmsnnet.evaluation import pareto_front
from mmsnnet.models.backbones.budget import points_of_space
from mmsnnet.models.backbones.image_sizes import warn
from mmsnnet.stitching import Cost, Stitch, StitchSampler, StitchSpace, flops_bins
from mmsnnet.stitching.sampling import equal_flops

CONDITIONS = ("kinds", "stitches", "max_crossings", "front_of", "metric")
SETTINGS = (*CONDITIONS, "equal_flops")


def stitches_to_draw(space: StitchSpace, choice: Mapping[str, Any]) -> tuple[Stitch, ...]:
    """The stitches that fulfil all conditions of ``choice``.

    Args:
        space: where they are chosen from.
        choice: any of these keys.

            - ``kinds``: kinds of stitches, such as ``['S', 'L', 'SL', 'LS']``; ``'S'`` and ``'L'`` are the anchors;
            - ``stitches``: ids or names, as of :meth:`mmsnnet.stitching.StitchSpace.select`;
            - ``max_crossings``: the most stitching layers of a route;
            - ``front_of``: a file of operating points, as ``tools/test.py --out`` writes it, for the anchors and the
              Pareto front of ``metric`` over FLOPs;
            - ``metric``: the task's main metric by default.

            ``equal_flops`` is for :func:`sampler_of`.

    Raises:
        SettingError: no stitch is left, or a kind or key is unknown.
        FileNotFoundError, ValueError: the file of operating points is missing, or of another space.
    """
    check_keys("StitchedViT's draw_from", choice, SETTINGS)
    kinds, stitches, max_crossings, front_of, metric = map(choice.get, CONDITIONS)
    chosen = space.stitches
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        known = dict.fromkeys(stitch.kind for stitch in space)
        if unknown := [kind for kind in kinds if kind not in known]:
            raise SettingError(f"StitchedViT's draw_from.kinds has no {unknown[0]!r}; the space has {', '.join(known)}")
        chosen = tuple(stitch for stitch in chosen if stitch.kind in kinds)
    if stitches is not None:
        selected = space.select(stitches)
        chosen = tuple(stitch for stitch in chosen if stitch in selected)
    if max_crossings is not None:
        chosen = tuple(stitch for stitch in chosen if len(stitch.layers) <= max_crossings)
    if front_of is not None:
        front = {point.id for point in pareto_front(points_of_space(front_of, space), metric=metric)}
        chosen = tuple(stitch for stitch in chosen if stitch.id in front or stitch in space.anchors)
    if not chosen:
        raise SettingError("StitchedViT's draw_from leaves no stitch to train: loosen one of its conditions")
    return chosen


def sampler_of(
    space: StitchSpace, choice: Mapping[str, Any], costs: Mapping[int, Cost], flops_step: float, seed: int
) -> StitchSampler:
    """The sampler of the stitches that training draws; warns if there is one bin.

    Args:
        space: of the stitches.
        choice: as of :func:`stitches_to_draw`. With ``equal_flops=True`` each bin gets the same FLOPs in
            training, except the costliest; see :func:`mmsnnet.stitching.sampling.equal_flops`.
        costs: by stitch id.
        flops_step: width of a bin in multiply-accumulates.
        seed: of the draws.

    Raises:
        SettingError: as :func:`stitches_to_draw`; ``equal_flops`` is neither True nor False.
    """
    stitches, is_equal = stitches_to_draw(space, choice), choice.get("equal_flops", False)
    if not isinstance(is_equal, bool):
        raise SettingError(f"StitchedViT's draw_from.equal_flops must be True or False, got {is_equal!r}")
    flops = {stitch.id: costs[stitch.id].flops for stitch in stitches}
    bins = flops_bins(flops, flops_step)
    if len(bins) == 1 < len(stitches) and space.scheme != "sliding_window":  # published as uniform
        warn(
            f"All {len(stitches)} stitches fall into one FLOPs bin: training draws them uniformly and the anchors "
            f"rarely. Lower StitchedViT's flops_step, now {flops_step:.3g}."
        )
    return StitchSampler(bins, seed, weights=equal_flops(bins, flops) if is_equal else ())
