"""``StitchedBackbone``: a stitched network as a backbone for MMSegmentation and MMDetection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mmengine import dist
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.evaluation import OperatingPoint, read_points, select_stitch
from mmsnnet.evaluation.selection import Points
from mmsnnet.models.backbones.taps import Taps
from mmsnnet.models.checkpoint_reading import HISTORY_GLOBALS
from mmsnnet.models.model_weights import DRAWS
from mmsnnet.registry import MODELS
from mmsnnet.stitching import (
    Anchor,
    Component,
    Cost,
    CostModel,
    LayerKey,
    PrefixPlan,
    SharedPrefixes,
    Stitch,
    StitchedNetwork,
    StitchSampler,
    StitchSpace,
    UnknownStitchError,
    cost_model,
    create_anchor,
    flops_bins,
    load_pretrained,
    prefix_order,
)
from mmsnnet.stitching.route_parts import Part, classifier_parts, part_parameters, tap_parts


@MODELS.register_module(name=["StitchedBackbone", "StitchedViT"])
class StitchedBackbone(BaseModule):
    """SN-Netv2 (arXiv 2307.00154) as a backbone: pretrained ViTs joined by stitching layers.

    In evaluation mode it runs the stitch chosen with :meth:`set_stitch`. In training mode it draws one itself at each
    forward (resource-constrained sampling), as a pure function of ``seed`` and of the number of draws so far; that
    number travels in the state dict under ``draws``, as a tensor on the CPU that no step reads.

    Images (B, 3, H, W) give :class:`Taps`, a tuple with one map (B, C, h, w) for each of ``out_indices``, in the width
    C of the largest anchor, whichever route ran; or, with ``num_classes``, logits (B, num_classes).

    Args:
        anchors: one dict for each anchor, smallest first: ``model``, a plain ViT of timm's; ``pretrained``, what
            :func:`mmsnnet.stitching.load_pretrained` takes (a path, a URL, ``hf-hub:`` or True), or None for random
            weights, or ``dict(source=..., prefix=...)`` to choose one of several models in a file; ``rel_pos_bias``,
            ``window_size`` and ``global_blocks`` as of :func:`mmsnnet.stitching.create_anchor`; all else goes to
            ``timm.create_model``. One anchor alone makes a space of one stitch.
        img_size: the training input size, height and width or the side. Any other size works too: images are padded to
            :meth:`padded_size`, at the bottom and on the right.
        out_indices: blocks of the largest anchor whose output is handed out, or one; the last by default. Given as
            ``dict(train=..., test=...)``, the taps of ``train`` that ``test`` lacks are neither run nor projected in
            evaluation mode and come as None, so that a head's ``in_index`` holds in both. A None among them holds the
            place of a tap that neither mode has.
        num_classes: keep the norm and the head of each anchor: forward then gives the logits of the head of the anchor
            that the route ends in, and there are no taps. ``StitchedClassifier`` sets it.
        scheme: ``'two_way'`` (SN-Netv2) or ``'one_way'`` (SN-Net); of three anchors and more, each is stitched to its
            neighbours.
        rank: of the low-rank updates of the stitching layers; 0 trains the layers' full weights.
        flops_step: the width of a FLOPs bin in resource-constrained sampling, in multiply-accumulates.
        seed: of the draws.
        stitch: id or name of the stitch for evaluation mode; the largest anchor alone by default.
        budget: the arguments of :meth:`set_budget`, which chooses the stitch for evaluation mode in its place:
            ``dict(points='front.json', max_gflops=200)``.
        only: id or name of the one stitch to build, which makes a space of this stitch: without the blocks, stems,
            classifiers and stitching layers that it does not run. Its weights are those of a checkpoint, as
            :func:`mmsnnet.apis.extract_stitch` writes one: there is nothing to initialise stitching layers from.
        with_cp: recompute the activations of each block in the backward pass instead of keeping them.
        compile: compile each block for training mode with ``torch.compile``: True, or a dict of its arguments; see
            :meth:`mmsnnet.stitching.StitchedNetwork.compile_blocks`. The key ``compile`` of a config, which is the
            runner's, would compile the whole step anew for each stitch.
        frozen_stages: -1 freezes nothing, 0 the stems, ``n`` also the first ``n`` blocks of the largest anchor and
            those blocks of the others that correspond to these alone.
        frozen_anchors: indices of anchors to freeze altogether.
        init_cfg: as of any mmengine module.

    Raises:
        ValueError, TypeError: the anchors do not fit each other, or an argument is out of range.
    """

    def __init__(
        self,
        anchors: Sequence[Mapping[str, Any]],
        img_size: int | Sequence[int] = 224,
        out_indices: int | Sequence[int | None] | Mapping[str, int | Sequence[int]] | None = None,
        num_classes: int | None = None,
        scheme: str = "two_way",
        rank: int = 16,
        flops_step: float = 10e9,
        seed: int = 0,
        stitch: int | str | None = None,
        budget: Mapping[str, Any] | None = None,
        only: int | str | None = None,
        with_cp: bool = False,
        compile: bool | Mapping[str, Any] = False,
        frozen_stages: int = -1,
        frozen_anchors: Sequence[int] = (),
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if stitch is not None and budget is not None:
            raise ValueError(f"stitch={stitch!r} and budget choose the route of evaluation mode both: give one of them")
        self.img_size = _image_size(img_size)
        self.pretrained, makers = [], []
        if isinstance(anchors, Mapping | str) or not all(isinstance(config, Mapping) for config in anchors):
            raise TypeError(f"anchors is a list of dicts, each with 'model', the name of a timm model; got {anchors!r}")
        for config in map(dict, anchors):
            if "model" not in config:
                raise ValueError(f"an anchor needs 'model', the name of a timm model; got {config}")
            if "img_size" in config:
                raise ValueError("img_size is set once, for the backbone, not for an anchor")
            self.pretrained.append(config.pop("pretrained", None))
            _check_pretrained(self.pretrained[-1], config["model"])
            if reserved := {"classifier", "num_classes"} & set(config):
                raise ValueError(
                    f"{', '.join(sorted(reserved))} is no key of an anchor: num_classes is set once, for the backbone"
                )
            head = {} if num_classes is None else dict(classifier=True, num_classes=num_classes)
            makers.append(partial(create_anchor, config.pop("model"), self.img_size, **head, **config))
        if only is not None and any(self.pretrained):
            raise ValueError(
                f"only={only!r} builds what one stitch runs, whose weights come from its checkpoint: leave out "
                "'pretrained' of the anchors"
            )
        if num_classes is not None and out_indices is not None:
            raise ValueError("a backbone with num_classes gives logits: out_indices does not go with it")
        with nullcontext() if only is None else torch.device("meta"):
            built = [make() for make in makers]
        space = _space(scheme, [anchor.depth for anchor in built])
        self.places, self.out_indices, self.test_out_indices = _per_mode(out_indices, built[-1].depth)
        if only is not None:
            if num_classes is None:
                parts = tap_parts(space, space[only], self.out_indices)
            else:
                parts = classifier_parts(space[only])
            built = [_with_parts(index, parts, outline, makers[index]) for index, outline in enumerate(built)]
            space = space.only(only, [part for part in parts if isinstance(part, LayerKey)])
        self.network = StitchedNetwork(built, space, rank=rank, with_cp=with_cp)
        if not isinstance(compile, bool | Mapping):
            raise TypeError(f"compile is True, False or a dict of torch.compile's arguments; got {compile!r}")
        if compile is not False:
            self.network.compile_blocks(**({} if compile is True else compile))
        self.space: StitchSpace = self.network.space
        self.num_classes = num_classes
        self.flops_step = flops_step
        self.seed = seed
        # How many stitches a training step runs one after the other; the training loop sets it.
        self.stitches_per_step = 1
        self.draws = 0
        self.drawn: Stitch | None = None
        default = self.space.anchors or self.space.stitches
        self._stitch = default[-1] if stitch is None else self.space[stitch]
        self._sampler: StitchSampler | None = None
        self._plan: tuple[tuple[Stitch, ...], PrefixPlan] | None = None
        self._shared: SharedPrefixes | None = None
        self._cost_models: dict[tuple[int, int], CostModel] = {}
        self._warned_of_padding = False
        self._points: tuple[OperatingPoint, ...] | None = None
        self._metric: str | None = None
        if budget is not None:
            self.set_budget(**budget)
        self._freeze(frozen_stages, frozen_anchors)
        self.register_state_dict_post_hook(_save_draws)

    @property
    def stitch(self) -> Stitch:
        """The active route of evaluation mode."""
        return self._stitch

    def set_stitch(self, stitch: int | str | Stitch) -> None:
        """Chooses the route of evaluation mode, by its id or name.

        Raises:
            UnknownStitchError: the space has no such stitch.
        """
        found = self.space[stitch.id if isinstance(stitch, Stitch) else stitch]
        if isinstance(stitch, Stitch) and stitch != found:
            raise UnknownStitchError(f"stitch {stitch} is of another space: in this one, id {found.id} is {found.name}")
        self._stitch = found
        if self._shared is not None:
            self._shared.begin()

    def set_budget(
        self,
        points: Points | None = None,
        metric: str | None = None,
        *,
        max_gflops: float | None = None,
        max_latency_ms: float | None = None,
        higher: bool | None = None,
    ) -> OperatingPoint:
        """Chooses the best route for evaluation mode that costs no more than a budget, and returns its operating point.

        Args:
            points: what was measured of this model's stitches, as :func:`mmsnnet.evaluation.read_points` takes it: a
                file of operating points, say. Points once given are kept for later calls, and the metric with them.
            metric: what the best has most of, or least; by default what the task is known by.
            max_gflops, max_latency_ms: the budget, as of :func:`mmsnnet.evaluation.select_stitch`: one of the two.
            higher: whether more of the metric is better, where its name does not tell.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no points were ever given, or they are of another stitch space; what
                :func:`mmsnnet.evaluation.select_stitch` refuses, a budget below the cheapest stitch for one. The active
                route stays as it was.
        """
        if points is not None:
            found = read_points(points)
            self.check_points(found)
        elif self._points is not None:
            found, metric = self._points, self._metric if metric is None else metric
        else:
            raise ValueError(
                "a budget needs points, of which to choose: the file of operating points that tools/test.py --out wrote"
            )
        chosen = select_stitch(
            found, max_gflops=max_gflops, max_latency_ms=max_latency_ms, metric=metric, higher=higher
        )
        self._points, self._metric = found, metric
        self.set_stitch(chosen.id)
        return chosen

    def check_points(self, points: Iterable[OperatingPoint]) -> None:
        """Raises ValueError where operating points are of another stitch space: by their ids and names."""
        for point in points:
            if point.id not in self.space:
                reason = f"stitch {point} is not in this one, of {len(self.space)} stitches"
            elif (own := self.space[point.id]).name != point.name:
                reason = f"id {point.id} is {point.name} there, and {own.name} here"
            else:
                continue
            raise ValueError(f"the operating points are of another stitch space: {reason}")

    def sampler(self) -> StitchSampler:
        """Draws the stitches of training mode, from bins of their FLOPs at ``img_size`` with the taps of training.

        The costs are counted at the first call.
        """
        if self._sampler is None:
            bins = flops_bins({id_: cost.flops for id_, cost in self.training_costs().items()}, self.flops_step)
            if len(bins) == 1 < len(self.space):
                print_log(
                    f"All {len(self.space)} stitches fall into one FLOPs bin: training draws them uniformly and the "
                    f"anchors rarely. Lower StitchedViT's flops_step, now {self.flops_step:.3g}.",
                    logger="current",
                    level=30,
                )
            self._sampler = StitchSampler(bins, self.seed)
        if self._sampler.stitches_per_step != self.stitches_per_step:
            self._sampler = replace(self._sampler, stitches_per_step=self.stitches_per_step)
        return self._sampler

    def spread(self, number: int = 4) -> tuple[Stitch, ...]:
        """The anchors, and the middle stitches of up to ``number`` FLOPs bins, evenly apart: a handful that shows how
        the whole space trains."""
        anchors = self.space.anchors
        bins = [[id_ for id_ in bin_ if self.space[id_] not in anchors] for bin_ in self.sampler().bins]
        middles = [bin_[len(bin_) // 2] for bin_ in bins if bin_]
        number = min(number, len(middles))
        chosen = [middles[(2 * k + 1) * len(middles) // (2 * number)] for k in range(number)]
        return self.space.select([*(anchor.id for anchor in anchors), *chosen])

    def prefix_order(self, stitches: Iterable[Stitch]) -> tuple[Stitch, ...]:
        """Stitches in the order in which they share most of what evaluation mode runs."""
        return prefix_order(self.space, tuple(stitches), self._ends)

    @contextmanager
    def reuse_prefixes(self, stitches: Iterable[int | str | Stitch]) -> Iterator[None]:
        """Lets stitches share what they have in common, for one batch: inside, after :meth:`set_stitch`, the n-th call
        of the backbone goes on from what the n-th call for an earlier stitch has left. The results are the same, to the
        bit on one device; so the heads, slide inference, flips and two-stage detectors need not know.

        ``stitches`` are those that will run, in this order, best that of :meth:`prefix_order`; what they share is kept
        until the last one that needs it. Evaluation mode only, without gradients.

        Raises:
            UnknownStitchError: the space lacks one of them.
            RuntimeError: the prefixes of another batch are being reused already; within, the n-th call of a stitch has
                other images than that of another.
        """
        if self._shared is not None:
            raise RuntimeError("prefixes are being reused already: one batch at a time")
        order = tuple(stitch if isinstance(stitch, Stitch) else self.space[stitch] for stitch in stitches)
        if self._plan is None or self._plan[0] != order:
            self._plan = order, PrefixPlan(self.space, order, self._ends)
        self._shared = SharedPrefixes(self.network, self._plan[1])
        try:
            yield
        finally:
            self._shared = None

    @property
    def _ends(self) -> tuple[int, ...] | None:
        """The taps of evaluation mode, None where there are logits."""
        return None if self.num_classes is not None else self.test_out_indices

    def cost_model(self, input_shape: tuple[int, int] | None = None) -> CostModel:
        """The cost of every component at ``input_shape`` (height, width), ``img_size`` by default; counted once."""
        shape = self.img_size if input_shape is None else input_shape
        if shape not in self._cost_models:
            self._cost_models[shape] = cost_model(self.network, shape)
        return self._cost_models[shape]

    def costs(self, input_shape: tuple[int, int] | None = None) -> dict[int, Cost]:
        """What the backbone costs in evaluation mode, by stitch id."""
        return self._costs(self.cost_model(input_shape), self.test_out_indices)

    def training_costs(self) -> dict[int, Cost]:
        """What the backbone costs at ``img_size`` with the taps of training, by stitch id."""
        return self._costs(self.cost_model(), self.out_indices)

    def _costs(self, model: CostModel, out_indices: tuple[int, ...]) -> dict[int, Cost]:
        if self.num_classes is not None:
            return {stitch.id: model.classifier(stitch) for stitch in self.space}
        return {stitch.id: model.stitch(stitch, out_indices) for stitch in self.space}

    def trained_parameters(self, stitch: Stitch) -> tuple[nn.Parameter, ...]:
        """The trainable parameters that a forward in training mode uses if it draws ``stitch``, in the order of their
        first use: those that may get a gradient."""
        if self.num_classes is None:
            parts = tap_parts(self.space, stitch, self.out_indices)
        else:
            parts = classifier_parts(stitch)
        used = dict.fromkeys(parameter for part in parts for parameter in part_parameters(self.network, part))
        return tuple(parameter for parameter in used if parameter.requires_grad)

    def init_weights(self) -> None:
        """Does what ``init_cfg`` says, then loads the anchors' pretrained weights, unless ``init_cfg`` has loaded a
        checkpoint of the whole backbone. The runner calls it on each rank: the first fetches what is not there yet, and
        the others find it."""
        first = not self.is_init
        super().init_weights()
        whole = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        if not first or any(config["type"] == "Pretrained" for config in whole):
            return
        try:
            if dist.is_main_process():
                self._load_anchors()
        finally:
            dist.barrier()
        if not dist.is_main_process():
            self._load_anchors()

    def _load_anchors(self) -> None:
        for index, source in enumerate(self.pretrained):
            if source:  # what HISTORY_GLOBALS allow is in a checkpoint of a run
                place = source if isinstance(source, Mapping) else dict(source=source)
                report = load_pretrained(self.network.anchor(index), safe_globals=HISTORY_GLOBALS, **place)
                print_log(f"Anchor {index} from {report}", logger="current")

    def forward(self, images: Tensor) -> Taps | Tensor:
        """Images (B, 3, H, W) to one map (B, C, h, w) for each of ``out_indices``, None where evaluation mode leaves a
        tap out; with ``num_classes`` to logits (B, num_classes).

        Raises:
            RuntimeError: in training mode, where stitching layers have been neither initialised nor loaded.
        """
        stitch = self._draw((images.shape[-2], images.shape[-1])) if self.training else self._stitch
        walk = None if self.training or self._shared is None else self._shared.walk(images, stitch)
        if self.num_classes is not None:
            return self.network.classify(images, stitch, walk)
        self._warn_of_padding((images.shape[-2], images.shape[-1]))
        out_indices = self.out_indices if self.training else self.test_out_indices
        tokens = self.network.tokens(images, stitch, out_indices, walk)
        return self._hand_out(dict(zip(out_indices, tokens, strict=True)), images)

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size (height, width) that the maps of images of ``image_size`` cover: that of whole patches."""
        return self.network.anchor(-1).padded_size(image_size)

    def _warn_of_padding(self, image_size: tuple[int, int]) -> None:
        """Warns once that maps cover more than the image. A program that is being traced has no sizes to compare."""
        if self._warned_of_padding or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        padded = self.padded_size(image_size)
        if padded != image_size:
            self._warned_of_padding = True
            print_log(
                f"Images of {image_size[0]} x {image_size[1]} are not whole patches: the backbone's maps cover "
                f"{padded[0]} x {padded[1]}, and a head that resizes its maps to the image squeezes predictions. Set "
                "model.type to mmsnnet.EncoderDecoder or mmsnnet.DepthEstimator, which pad and cut, or have the data "
                "preprocessor pad (size_divisor, pad_size_divisor). Heads that count in strides, as detectors' do, are "
                "right either way.",
                logger="current",
                level=30,
            )

    def zeros(self, images: Tensor) -> Taps | Tensor:
        """What evaluation mode gives for images (B, 3, H, W), in its shapes, with nothing run and every value zero."""
        if self.num_classes is not None:
            return images.new_zeros(len(images), self.num_classes)
        anchor = self.network.anchor(-1)
        rows, columns = anchor.grid((images.shape[-2], images.shape[-1]))
        tokens = images.new_zeros(len(images), anchor.num_prefix_tokens + rows * columns, anchor.width)
        return self._hand_out(dict.fromkeys(self.test_out_indices, tokens), images)

    def _hand_out(self, tokens: Mapping[int, Tensor], images: Tensor) -> Taps:
        """Taps as tokens (B, N, C), by their indices, as the maps and class tokens of :class:`Taps`."""
        anchor = self.network.anchor(-1)
        grid = anchor.grid((images.shape[-2], images.shape[-1]))
        wanted = [None if index is None else tokens.get(index) for index in self.places]
        maps = [None if tap is None else anchor.to_map(tap, grid) for tap in wanted]
        if torch.jit.is_tracing():  # a traced program can return tensors alone
            maps = [images.new_zeros(0) if tap is None else tap for tap in maps]
        if not anchor.has_class_token:
            return Taps(maps)
        # A copy: a head may work in place on what other stitches share.
        return Taps(maps, [None if tap is None else tap[:, 0].clone() for tap in wanted])

    def _draw(self, image_size: tuple[int, int]) -> Stitch:
        if self.drawn is None and image_size != self.img_size:
            print_log(
                f"Training on images of {' x '.join(map(str, image_size))}, while StitchedViT's img_size, for which "
                f"position embeddings are stored and FLOPs counted, is {' x '.join(map(str, self.img_size))}: set it "
                "to the size that the training pipeline crops or pads to.",
                logger="current",
                level=30,
            )
        if self.drawn is None and not self.network.initialized:
            raise RuntimeError(
                "the stitching layers have been neither initialised nor loaded, and training from random ones would "
                "waste the anchors: add dict(type='mmsnnet.StitchInitHook') to custom_hooks, or load a checkpoint"
            )
        if self.drawn is None and self.network.anchor(-1).compiled:
            print_log("Blocks are compiled when a stitch first runs them, which takes up to minutes", logger="current")
        self.drawn = self.space[self.sampler().draw(self.draws)]
        self.draws += 1
        return self.drawn

    def _freeze(self, stages: int, anchors: Sequence[int]) -> None:
        depths = self.space.depths
        if not -1 <= stages <= depths[-1]:
            raise ValueError(f"frozen_stages is -1 to {depths[-1]}, the blocks of the largest anchor; got {stages}")
        if any(not 0 <= index < len(depths) for index in anchors):
            raise ValueError(f"frozen_anchors are indices of the {len(depths)} anchors; got {tuple(anchors)}")
        for index in range(len(depths)):
            if index in anchors:
                self.network.anchor(index).freeze()
            elif stages >= 0:
                self.network.anchor(index).freeze(self.space.corresponding_block(index, stages))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        draws = state_dict.pop(prefix + DRAWS, None)
        if draws is not None:
            self.draws = int(draws)
        super()._load_from_state_dict(state_dict, prefix, *args)


def find_stitched_backbone(model: nn.Module) -> StitchedBackbone:
    """The ``StitchedBackbone`` inside a model, wrapped or not.

    Raises:
        TypeError: there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, StitchedBackbone)]
    if len(found) != 1:
        raise TypeError(
            f"{type(model).__name__} has {len(found)} backbones of type mmsnnet.StitchedViT, where one is needed: set "
            "model.backbone.type in the config"
        )
    return found[0]


def _space(scheme: str, depths: Sequence[int]) -> StitchSpace:
    if len(depths) == 1:
        return StitchSpace.single(depths[0])
    schemes = {"two_way": StitchSpace.two_way, "one_way": StitchSpace.one_way}
    if scheme not in schemes:
        raise ValueError(f"scheme is one of {', '.join(schemes)}; got {scheme!r}")
    return schemes[scheme](depths)


def _check_pretrained(pretrained: object, model: str) -> None:
    """Refuse a ``pretrained`` of an anchor that names no source."""
    if isinstance(pretrained, Mapping):
        if unknown := sorted(set(pretrained) - {"source", "prefix"}):
            raise SettingError(
                f"pretrained of anchor {model!r} is a source or dict(source=..., prefix=...), got {', '.join(unknown)}"
            )
        pretrained = pretrained.get("source") or ""
    if pretrained == "":
        raise SettingError(f"pretrained of anchor {model!r} is empty: name a source, or None for none")


def _with_parts(index: int, parts: Sequence[Part], outline: Anchor, make: Callable[[], Anchor]) -> Anchor:
    """Anchor ``index`` with those of its parts alone that are among ``parts``: an anchor without any stays an outline,
    whose weights are never drawn."""
    own = [part for part in parts if isinstance(part, Component) and part.anchor == index]
    anchor = make() if own else outline
    blocks = [part.block for part in own if part.kind == "block"]
    anchor.keep(Component("stem", index) in own, blocks, Component("classifier", index) in own)
    return anchor


def _image_size(size: float | Sequence[float]) -> tuple[int, int]:
    """Height and width; a number stands for both."""
    given = (size, size) if isinstance(size, int | float) else tuple(size)
    if len(given) != 2 or not all(isinstance(side, int | float) and side == int(side) > 0 for side in given):
        raise ValueError(f"img_size is the height and width of images in pixels, or the side of a square; got {size!r}")
    return int(given[0]), int(given[1])


def _listed(indices: int | Sequence[int | None]) -> tuple[int | None, ...]:
    return (indices,) if isinstance(indices, int) else tuple(indices)


def _per_mode(
    out_indices: int | Sequence[int | None] | Mapping[str, int | Sequence[int]] | None, depth: int
) -> tuple[tuple[int | None, ...], tuple[int, ...], tuple[int, ...]]:
    """The places of what is handed out, the taps of training and those of evaluation mode."""
    if out_indices is None:
        out_indices = (depth - 1,)
    places: tuple[int | None, ...]
    if isinstance(out_indices, Mapping):
        if set(out_indices) != {"train", "test"}:
            raise ValueError(f"out_indices per mode is dict(train=..., test=...), got keys {sorted(out_indices)}")
        train, test = _listed(out_indices["train"]), _listed(out_indices["test"])
        places = train
    else:
        places = _listed(out_indices)
        train = test = tuple(index for index in places if index is not None)
    if not train or not test:
        raise ValueError("out_indices names at least one block in each mode")
    wrong = [index for index in train if not isinstance(index, int) or not 0 <= index < depth]
    if wrong:
        raise ValueError(f"out_indices are blocks of the largest anchor, 0 to {depth - 1}; got {wrong}")
    if not set(test) <= set(train):
        raise ValueError(f"the taps of evaluation mode are among those of training mode {train}; got {test}")
    return places, train, test


def _save_draws(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    assert isinstance(module, StitchedBackbone)
    state_dict[prefix + DRAWS] = torch.tensor(module.draws)
