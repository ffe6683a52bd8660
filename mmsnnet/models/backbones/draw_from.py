"""Choose the stitches that training draws; the space keeps all of them, with their ids."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from mmsnnet.errors import MissingFileError, SettingError, check_keys, check_whole_number
from mmsnnet.evaluation import pareto_front
from mmsnnet.models.backbones.budget import points_of_space
from mmsnnet.models.backbones.image_sizes import warn
from mmsnnet.stitching import Cost, Stitch, StitchSampler, StitchSpace, UnknownStitchError, flops_bins
from mmsnnet.stitching.sampling import equal_flops

CONDITIONS = ("kinds", "stitches", "max_crossings", "front_of", "metric")
SETTINGS = (*CONDITIONS, "equal_flops")


def checked_choice(choice: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The choice of :func:`stitches_to_draw` from a config, with keys and types checked; empty for None.

    Files are not read: a model can be built where they are missing.

    Raises:
        SettingError: ``choice`` is no dict, a key is unknown, a value is of a wrong type, or ``metric`` is without
            ``front_of``.
    """
    if choice is None:
        return {}
    if not isinstance(choice, Mapping):
        raise SettingError(f"StitchedViT's draw_from must be a dict such as dict(max_crossings=1), got {choice!r}")
    check_keys("StitchedViT's draw_from", choice, SETTINGS)
    kinds, stitches, max_crossings, front_of, metric = map(choice.get, CONDITIONS)
    if kinds is not None and not _is_list(kinds, str) and not isinstance(kinds, str):
        raise SettingError(f"StitchedViT's draw_from.kinds must be a kind of stitches or a list of them, got {kinds!r}")
    if stitches is not None and not _is_list(stitches, str | Integral) and not isinstance(stitches, str):
        raise SettingError(
            f"StitchedViT's draw_from.stitches must be a list of ids or names of stitches, got {stitches!r}"
        )
    if max_crossings is not None:
        check_whole_number("StitchedViT's draw_from.max_crossings", max_crossings, 0)
    if front_of is not None and (not isinstance(front_of, str | os.PathLike) or front_of == ""):
        raise SettingError(
            f"StitchedViT's draw_from.front_of must be the path of a file of operating points, got {front_of!r}"
        )
    if metric is not None and not isinstance(metric, str):
        raise SettingError(f"StitchedViT's draw_from.metric must be the name of a metric, got {metric!r}")
    if metric is not None and front_of is None:
        raise SettingError(
            f"StitchedViT's draw_from.metric, {metric!r}, compares the points of front_of, which is not set"
        )
    is_equal = choice.get("equal_flops", False)
    if not isinstance(is_equal, bool):
        raise SettingError(f"StitchedViT's draw_from.equal_flops must be True or False, got {is_equal!r}")
    return choice


def _is_list(value: object, types: Any) -> bool:
    """Whether a value is a sequence of these types, without booleans."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return all(isinstance(item, types) and not isinstance(item, bool) for item in value)


def stitches_to_draw(space: StitchSpace, choice: Mapping[str, Any]) -> tuple[Stitch, ...]:
    """The stitches that fulfil all conditions of ``choice``.

    Args:
        space: where they are chosen from.
        choice: any of these keys, as :func:`checked_choice` returns it.

            - ``kinds``: kinds of stitches, such as ``['S', 'L', 'SL', 'LS']``; ``'S'`` and ``'L'`` are the anchors;
            - ``stitches``: ids or names, as of :meth:`mmsnnet.stitching.StitchSpace.select`;
            - ``max_crossings``: the most stitching layers of a route;
            - ``front_of``: a file of operating points, as ``tools/test.py --out`` writes it, for the anchors and the
              Pareto front of ``metric`` over FLOPs;
            - ``metric``: the task's main metric by default.

            ``equal_flops`` is for :func:`sampler_of`.

    Raises:
        SettingError: no stitch is left, a kind is unknown, ``front_of`` is a folder, damaged or of another space, or
            its points lack ``metric``.
        UnknownStitchError: the space lacks one of ``stitches``.
        MissingFileError: the file of operating points is missing.
    """
    kinds, stitches, max_crossings, front_of, metric = map(choice.get, CONDITIONS)
    chosen = space.stitches
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        known = dict.fromkeys(stitch.kind for stitch in space)
        if unknown := [kind for kind in kinds if kind not in known]:
            raise SettingError(f"StitchedViT's draw_from.kinds has no {unknown[0]!r}; the space has {', '.join(known)}")
        chosen = tuple(stitch for stitch in chosen if stitch.kind in kinds)
    if stitches is not None:
        try:
            selected = space.select(stitches)
        except UnknownStitchError as error:
            raise UnknownStitchError(f"StitchedViT's draw_from.stitches: {error}") from None
        chosen = tuple(stitch for stitch in chosen if stitch in selected)
    if max_crossings is not None:
        chosen = tuple(stitch for stitch in chosen if len(stitch.layers) <= max_crossings)
    if front_of is not None:
        if os.path.isdir(front_of):
            raise SettingError(
                f"StitchedViT's draw_from.front_of must be a file of operating points, as tools/test.py --out writes "
                f"it; {str(front_of)!r} is a folder"
            )
        try:
            points = points_of_space(front_of, space)
        except FileNotFoundError as error:
            raise MissingFileError(f"StitchedViT's draw_from.front_of: {error}") from error
        except ValueError as error:
            raise SettingError(f"StitchedViT's draw_from.front_of: {error}") from error
        try:
            front = {point.id for point in pareto_front(points, metric=metric)}
        except ValueError as error:
            raise SettingError(f"StitchedViT's draw_from.metric, for {str(front_of)!r}: {error}") from error
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
        choice: as of :func:`stitches_to_draw`. With ``equal_flops=True`` each anchor has a bin of its own, and each bin
            gets the same FLOPs in training, except the largest anchor's; see
            :func:`mmsnnet.stitching.sampling.equal_flops`.
        costs: by stitch id.
        flops_step: width of a bin in multiply-accumulates.
        seed: of the draws.

    Raises:
        SettingError, MissingFileError: as :func:`stitches_to_draw`.
    """
    stitches = stitches_to_draw(space, choice)
    flops = {stitch.id: costs[stitch.id].flops for stitch in stitches}
    is_equal = choice.get("equal_flops", False)
    alone = [anchor.id for anchor in space.anchors] if is_equal else []
    bins = flops_bins(flops, flops_step, alone)
    if len(bins) == 1 < len(stitches) and space.scheme != "sliding_window":  # published as uniform
        warn(
            f"All {len(stitches)} stitches fall into one FLOPs bin: training draws them uniformly and the anchors "
            f"rarely. Lower StitchedViT's flops_step, now {flops_step:.3g}."
        )
    if not is_equal:
        return StitchSampler(bins, seed)
    largest = max((index for index, bin_ in enumerate(bins) if bin_[0] in alone), default=-1)
    return StitchSampler(bins, seed, weights=equal_flops(bins, flops, largest))
