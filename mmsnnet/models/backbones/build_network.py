"""Build the stitched network of a config: anchors, space and stitching layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from mmengine.logging import print_log

from mmsnnet.errors import SettingError
from mmsnnet.models.backbones.taps import OutIndices
from mmsnnet.models.checkpoint_reading import HISTORY_GLOBALS
from mmsnnet.stitching import Anchor, LayerKey, StitchedNetwork, StitchSpace, create_anchor, load_pretrained
from mmsnnet.stitching.route_parts import AnchorPart, Part, parts_run


def build_network(
    anchors: Sequence[Mapping[str, Any]],
    img_size: tuple[int, int],
    out_indices: Any = None,
    num_classes: int | None = None,
    scheme: str = "two_way",
    skip_stages: Sequence[int] = (),
    skip_final_norm: bool = False,
    rank: int = 16,
    only: int | str | None = None,
    with_cp: bool = False,
    compile: bool | Mapping[str, Any] = False,
    frozen_stages: int = -1,
    frozen_anchors: Sequence[int] = (),
    norm_eval: bool = False,
) -> tuple[StitchedNetwork, OutIndices, list[Any]]:
    """Build a network from the settings of :class:`StitchedBackbone`.

    It reads no weights, so that a model for its cost or for a checkpoint needs no download.

    Returns:
        The network, its taps, and the setting ``pretrained`` of each anchor.

    Raises:
        ValueError, TypeError: a setting is wrong; the message names it.
    """
    if isinstance(anchors, Mapping | str) or not all(isinstance(config, Mapping) for config in anchors):
        raise TypeError(f"anchors is a list of dicts, each with 'model', the name of a timm model; got {anchors!r}")
    if num_classes is not None and out_indices is not None:
        raise ValueError("a backbone with num_classes gives logits instead of maps: leave out out_indices")
    if not isinstance(compile, bool | Mapping):
        raise TypeError(f"compile is True, False or a dict of torch.compile's arguments; got {compile!r}")
    classifier = {} if num_classes is None else dict(classifier=True, num_classes=num_classes)
    pretrained = [_pretrained(config) for config in anchors]
    makers = [_maker(config, img_size, classifier) for config in anchors]
    if only is not None and any(pretrained):
        raise ValueError(
            f"only={only!r} builds one stitch, whose weights come from its checkpoint: leave out 'pretrained' of the "
            "anchors"
        )
    # For a single stitch, anchors are built on the meta device first; _with_parts allocates those that it runs.
    with nullcontext() if only is None else torch.device("meta"):
        built = [make() for make in makers]
    space = StitchSpace.of(scheme, [anchor.stages for anchor in built], skip_stages, skip_final_norm)
    taps = OutIndices.parse(out_indices, built[-1].stages)
    if only is not None:
        parts = parts_run(space, space[only], None if num_classes is not None else taps.train)
        built = [_with_parts(index, parts, outline, makers[index]) for index, outline in enumerate(built)]
        space = space.only(only, [part for part in parts if isinstance(part, LayerKey)])
    network = StitchedNetwork(built, space, rank=rank, with_cp=with_cp)
    if only is None:
        network.check_size(img_size)
    if compile is not False:
        network.compile_blocks(**({} if compile is True else compile))
    for anchor in built:
        anchor.norm_eval = norm_eval
        anchor.train(anchor.training)
    _freeze(network, frozen_stages, frozen_anchors)
    return network, taps, pretrained


def load_anchors(network: StitchedNetwork, pretrained: Sequence[Any]) -> None:
    """Load the ``pretrained`` weights of each anchor that has some, and log the reports."""
    for index, source in enumerate(pretrained):
        if source:  # a checkpoint of a training run has HISTORY_GLOBALS beside its tensors
            place = source if isinstance(source, Mapping) else dict(source=source)
            report = load_pretrained(network.anchor(index), safe_globals=HISTORY_GLOBALS, **place)
            print_log(f"Anchor {index} from {report}", logger="current")


def _freeze(network: StitchedNetwork, stages: int, anchors: Sequence[int]) -> None:
    """Freeze the given anchors, and the stem and first stages of all others.

    Plain ViTs have one stage: there ``stages`` counts blocks of the largest anchor, and in other anchors the
    corresponding blocks are frozen.
    """
    depths, largest = network.space.depths, network.space.stages[-1]
    unit, most = ("stages", len(largest)) if len(largest) > 1 else ("blocks", depths[-1])
    if not -1 <= stages <= most:
        raise ValueError(f"frozen_stages is -1 to {most}, a number of the largest anchor's {unit}; got {stages}")
    if any(not 0 <= index < len(depths) for index in anchors):
        raise ValueError(f"frozen_anchors are indices of the {len(depths)} anchors; got {tuple(anchors)}")
    for index in range(len(depths)):
        anchor = network.anchor(index)
        if index in anchors:
            anchor.freeze()
        elif stages >= 0 and unit == "stages":
            anchor.freeze(sum(anchor.stages[:stages]))
        elif stages >= 0:
            anchor.freeze(network.space.corresponding_block(index, stages))


def _maker(config: Mapping[str, Any], img_size: tuple[int, int], classifier: Mapping[str, Any]) -> Callable[[], Anchor]:
    settings = dict(config)
    settings.pop("pretrained", None)
    model = settings.pop("model")
    if "img_size" in settings:
        raise ValueError("img_size is a setting of the backbone, not of an anchor")
    if reserved := {"classifier", "num_classes"} & set(settings):
        raise ValueError(
            f"{', '.join(sorted(reserved))} is no key of an anchor: num_classes is a setting of the backbone"
        )
    return partial(create_anchor, model, img_size, **classifier, **settings)


def _pretrained(config: Mapping[str, Any]) -> Any:
    """The ``pretrained`` of an anchor's config; an error if it names no source."""
    if "model" not in config:
        raise ValueError(f"an anchor needs 'model', the name of a timm model; got {dict(config)}")
    model, pretrained = config["model"], config.get("pretrained")
    source = pretrained
    if isinstance(pretrained, Mapping):
        if unknown := sorted(set(pretrained) - {"source", "prefix"}):
            raise SettingError(
                f"pretrained of anchor {model!r} is a source or dict(source=..., prefix=...), got {', '.join(unknown)}"
            )
        source = pretrained.get("source") or ""
    if source == "":
        raise SettingError(f"pretrained of anchor {model!r} is empty: name a source, or set None for random weights")
    return pretrained


def _with_parts(index: int, parts: Sequence[Part], outline: Anchor, make: Callable[[], Anchor]) -> Anchor:
    """Build anchor ``index`` with its components in ``parts`` alone.

    An anchor without such components stays an outline on the meta device, so that it needs no memory for weights.
    """
    components = [part.component for part in parts if isinstance(part, AnchorPart) and part.anchor == index]
    anchor = make() if components else outline
    anchor.keep(components)
    return anchor
