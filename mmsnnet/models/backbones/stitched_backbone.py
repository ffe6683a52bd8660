"""``StitchedBackbone``: a stitched network as a backbone for MMSegmentation and MMDetection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from mmengine import dist
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmsnnet.evaluation import OperatingPoint
from mmsnnet.evaluation.selection import Points
from mmsnnet.models.backbones.budget import Budget
from mmsnnet.models.backbones.build_network import build_network, load_anchors
from mmsnnet.models.backbones.draw_from import checked_choice, sampler_of
from mmsnnet.models.backbones.image_sizes import PaddingWarning, check_first_draw, parse_image_size
from mmsnnet.models.backbones.taps import TapNorms, Taps, tap_outlines
from mmsnnet.models.model_weights import DRAWS
from mmsnnet.registry import MODELS
from mmsnnet.stitching import (
    Cost,
    CostModel,
    PrefixPlan,
    SharedPrefixes,
    Stitch,
    StitchSampler,
    StitchSpace,
    UnknownStitchError,
    cost_model,
    prefix_order,
)
from mmsnnet.stitching.route_parts import Part, part_parameters, parts_run


@MODELS.register_module(name=["StitchedBackbone", "StitchedViT"])
class StitchedBackbone(BaseModule):
    """SN-Netv2 (arXiv 2307.00154) as a backbone: pretrained models joined by stitching layers.

    In evaluation mode it runs the stitch chosen with :meth:`set_stitch`. In training mode it draws a stitch in each
    forward (resource-constrained sampling), as a pure function of ``seed`` and of the number of draws so far. The state
    dict has that number as ``draws``.

    Images (B, 3, H, W) give :class:`Taps`, a tuple with one map (B, C, h, w) for each of ``out_indices``. C is the
    width of the largest anchor for every route. With ``num_classes``, images give logits (B, num_classes).

    Args:
        anchors: one dict for each anchor, smallest first. ``model`` is timm's name (docs/anchors.md). ``pretrained`` is
            a source for :func:`mmsnnet.stitching.load_pretrained` (a path, a URL, ``hf-hub:`` or True), or
            ``dict(source=..., prefix=...)`` to choose one of several models in a file; None leaves random weights.
            ``rel_pos_bias``, ``window_size`` and ``global_blocks`` are arguments of
            :func:`mmsnnet.stitching.create_anchor`, all others of ``timm.create_model``. One anchor is one stitch.
        img_size: the image size of training (height, width), or the side of a square. Images of other sizes work too:
            they are padded to :meth:`padded_size`, at the bottom and on the right.
        out_indices: the blocks of the largest anchor to tap, or one block; the last one by default. Of a hierarchical
            model these are stages, all by default. With ``dict(train=..., test=...)``, evaluation mode skips the taps
            that ``test`` lacks and returns None for them, so that a head's ``in_index`` is the same in both modes. A
            None among the indices is a map that is None in both modes.
        norm_taps: give each tap a LayerNorm, as mmseg's and mmdet's Swin and ConvNeXt have. All routes share it, and it
            trains from scratch at the rate of heads.
        num_classes: keep the norm and head of each anchor. ``forward`` then returns the logits of the anchor in which
            the route ends, and there are no taps. ``StitchedClassifier`` sets it.
        scheme, skip_stages, skip_final_norm: as of :meth:`mmsnnet.stitching.StitchSpace.of`: ``'two_way'`` (SN-Netv2),
            ``'one_way'`` or ``'sliding_window'`` (SN-Net). With three or more anchors, neighbours are stitched.
        rank: rank of the low-rank updates of the stitching layers; 0 trains the layers' full weights.
        flops_step: width of a FLOPs bin in resource-constrained sampling, in multiply-accumulates.
        seed: seed of the draws.
        draw_from: which stitches training draws, such as ``dict(max_crossings=1)``; all by default. The space stays
            (:func:`mmsnnet.models.backbones.draw_from.stitches_to_draw`).
        stitch: id or name of the stitch for evaluation mode; the largest anchor by default.
        budget: arguments of :meth:`set_budget`, which choose the stitch of evaluation mode instead of ``stitch``.
        only: id or name of the one stitch to build, from its parts alone; they keep their names. Load its weights from
            what :func:`mmsnnet.apis.extract_stitch` writes: a single stitch cannot initialise its stitching layers.
        with_cp: recompute the activations of each block in the backward pass instead of keeping them.
        compile: compile each block for training mode with ``torch.compile``: True, or a dict of its arguments; see
            :meth:`mmsnnet.stitching.StitchedNetwork.compile_blocks`. The runner's key ``compile`` at the top of a
            config would compile each stitch.
        frozen_stages: -1 freezes nothing, 0 the stems, ``n`` also the first ``n`` stages. Of plain ViTs, ``n`` counts
            blocks of the largest anchor, and freezes the blocks of others that correspond only to those.
        frozen_anchors: indices of anchors to freeze completely.
        norm_eval: leave all batch norms of the anchors in evaluation mode, as in mmdet: training uses and keeps their
            running statistics, and still trains their weights.
        init_cfg: as for any mmengine module.

    Raises:
        ValueError, TypeError: the anchors do not fit each other, or an argument is out of range.
    """

    def __init__(
        self,
        anchors: Sequence[Mapping[str, Any]],
        img_size: int | Sequence[int] = 224,
        out_indices: int | Sequence[int | None] | Mapping[str, int | Sequence[int]] | None = None,
        norm_taps: bool = False,
        num_classes: int | None = None,
        scheme: str = "two_way",
        skip_stages: Sequence[int] = (),
        skip_final_norm: bool = False,
        rank: int = 16,
        flops_step: float = 10e9,
        seed: int = 0,
        draw_from: Mapping[str, Any] | None = None,
        stitch: int | str | None = None,
        budget: Mapping[str, Any] | None = None,
        only: int | str | None = None,
        with_cp: bool = False,
        compile: bool | Mapping[str, Any] = False,
        frozen_stages: int = -1,
        frozen_anchors: Sequence[int] = (),
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if stitch is not None and budget is not None:
            raise ValueError(f"stitch={stitch!r} and budget both choose the stitch of evaluation mode: set one of them")
        if norm_taps and num_classes is not None:
            raise ValueError("a backbone with num_classes gives logits instead of maps: leave out norm_taps")
        self.img_size = parse_image_size(img_size)
        self.network, self.taps, self.pretrained = build_network(
            anchors,
            self.img_size,
            out_indices=out_indices,
            num_classes=num_classes,
            scheme=scheme,
            skip_stages=skip_stages,
            skip_final_norm=skip_final_norm,
            rank=rank,
            only=only,
            with_cp=with_cp,
            compile=compile,
            frozen_stages=frozen_stages,
            frozen_anchors=frozen_anchors,
            norm_eval=norm_eval,
        )
        self.tap_norms = TapNorms(self.taps, self.network.anchor(-1).widths if norm_taps else ())
        self.space: StitchSpace = self.network.space
        self.num_classes = num_classes
        # None if the backbone returns logits.
        self._trained_taps = None if num_classes is not None else self.taps.train
        self._evaluated_taps = None if num_classes is not None else self.taps.test
        self.flops_step = flops_step
        self.seed = seed
        self.draw_from = checked_choice(draw_from)
        # The number of stitches in a training step; the training loop sets it.
        self.stitches_per_step = 1
        # A Python number, not a buffer: reading a buffer on the GPU synchronises, and a buffer on the CPU breaks
        # DistributedDataParallel under NCCL.
        self.draws = 0
        self.drawn: Stitch | None = None
        default = self.space.anchors or self.space.stitches
        self._stitch = default[-1] if stitch is None else self.space[stitch]
        self._sampler: StitchSampler | None = None
        self._plan: tuple[tuple[Stitch, ...], PrefixPlan] | None = None
        self._shared: SharedPrefixes | None = None
        self._step: SharedPrefixes | None = None  # of a training step
        self._compares_steps = True
        self._cost_models: dict[tuple[int, int], CostModel] = {}
        self._padding_warning = PaddingWarning()
        self._budget = Budget(self.space)
        if budget is not None:
            self.set_budget(**budget)
        self.register_state_dict_post_hook(_save_draws)

    @property
    def stitch(self) -> Stitch:
        """The stitch of evaluation mode."""
        return self._stitch

    def set_stitch(self, stitch: int | str | Stitch) -> None:
        """Set the stitch of evaluation mode, by its id or name.

        Raises:
            UnknownStitchError: the space has no such stitch.
        """
        member = self.space[stitch.id if isinstance(stitch, Stitch) else stitch]
        if isinstance(stitch, Stitch) and stitch != member:
            raise UnknownStitchError(
                f"stitch {stitch} is of another space: in this one, id {member.id} is {member.name}"
            )
        self._stitch = member
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
        """Set the best stitch within a budget for evaluation mode, and return its operating point.

        Args:
            points: operating points of this model's stitches, or the path of their file
                (:func:`mmsnnet.evaluation.read_points`). Points and metric are kept for later calls.
            metric: the metric that compares stitches; the task's main metric by default.
            max_gflops, max_latency_ms: the budget, as for :func:`mmsnnet.evaluation.select_stitch`; set one of the two.
            higher: whether higher values of the metric are better; needed if its name is unknown.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no call has set points, they are of another stitch space, or
                :func:`mmsnnet.evaluation.select_stitch` raises, for example because the budget is below the cheapest
                stitch. The stitch stays unchanged.
        """
        chosen = self._budget.choose(
            points, metric, max_gflops=max_gflops, max_latency_ms=max_latency_ms, higher=higher
        )
        self.set_stitch(chosen.id)
        return chosen

    def sampler(self) -> StitchSampler:
        """The sampler of training mode.

        Its bins are over the FLOPs at ``img_size`` with the taps of training. The first call counts the costs.
        """
        if self._sampler is None:
            costs = self.training_costs()
            self._sampler = sampler_of(self.space, self.draw_from, costs, self.flops_step, self.seed)
        if self._sampler.stitches_per_step != self.stitches_per_step:
            self._sampler = replace(self._sampler, stitches_per_step=self.stitches_per_step)
        return self._sampler

    def draw_only(self, stitches: Iterable[int | str]) -> None:
        """Let training draw only these stitches from now on, by id or name; at least one."""
        self.draw_from = dict(stitches=list(stitches), equal_flops=self.draw_from.get("equal_flops", False))
        self._sampler = None

    def prefix_order(self, stitches: Iterable[Stitch]) -> tuple[Stitch, ...]:
        """Sort stitches so that they share most blocks in evaluation mode."""
        return prefix_order(self.space, tuple(stitches), self._evaluated_taps)

    @contextmanager
    def reuse_prefixes(self, stitches: Iterable[int | str | Stitch]) -> Iterator[None]:
        """Let the stitches of one batch share common blocks.

        Inside, after :meth:`set_stitch`, the n-th call of the backbone continues from what the n-th call for an earlier
        stitch computed, in evaluation mode without gradients. The results are the same, bit for bit on one device.
        Calls are counted, so that slide inference, flips and two-stage detectors need no change.

        Args:
            stitches: of the batch, in the order of their runs; :meth:`prefix_order` gives the best order.

        Raises:
            UnknownStitchError: the space lacks one of the stitches.
            RuntimeError: the context is active already; or, inside it, the n-th calls for two stitches have different
                images.
        """
        if self._shared is not None:
            raise RuntimeError("prefix reuse is active already: leave its context before the next batch")
        order = tuple(stitch if isinstance(stitch, Stitch) else self.space[stitch] for stitch in stitches)
        if self._plan is None or self._plan[0] != order:
            self._plan = order, PrefixPlan(self.space, order, self._evaluated_taps)
        self._shared = SharedPrefixes(self.network, self._plan[1])
        try:
            yield
        finally:
            self._shared = None

    @contextmanager
    def share_step(self) -> Iterator[None]:
        """Let the next ``stitches_per_step`` calls in training mode share common blocks, for one backward pass.

        Each call draws its stitch, and gets the same images as the others. Sum the losses of these calls before the
        backward pass. The gradients equal those of separate passes. Shared blocks draw their stochastic depth once, and
        update the statistics of batch norms once.

        Raises:
            RuntimeError: from a call: it has other images. Only the first step compares values (it waits for the GPU).
        """
        sampler = self.sampler()
        self.draws += -self.draws % self.stitches_per_step  # after a resumed run with another number
        numbers = range(self.draws, self.draws + self.stitches_per_step)
        stitches = tuple(self.space[sampler.draw(number)] for number in numbers)
        plan = PrefixPlan(self.space, stitches, self._trained_taps, keep=True)
        self._step = SharedPrefixes(self.network, plan, compare=self._compares_steps)
        try:
            yield
        finally:
            self._step = None
        self._compares_steps = False

    @property
    def out_indices(self) -> tuple[int, ...]:
        """The taps of training mode."""
        return self.taps.train

    @property
    def channels(self) -> tuple[int | None, ...]:
        """The channels of each map, which are the largest anchor's; None for a map that is always None."""
        return tuple(None if i is None else self.network.anchor(-1).widths[i] for i in self.taps.places)

    @property
    def test_out_indices(self) -> tuple[int, ...]:
        """The taps of evaluation mode."""
        return self.taps.test

    def parts(self, stitch: Stitch) -> list[Part]:
        """The parts of the network that a stitch runs in evaluation mode, in order."""
        return parts_run(self.space, stitch, self._evaluated_taps)

    def cost_model(self, input_shape: tuple[int, int] | None = None) -> CostModel:
        """Count the cost of every component at ``input_shape`` (height, width); results are cached.

        The default shape is ``img_size``.
        """
        shape = self.img_size if input_shape is None else input_shape
        if shape not in self._cost_models:
            self._cost_models[shape] = cost_model(self.network, shape)
        return self._cost_models[shape]

    def costs(self, input_shape: tuple[int, int] | None = None) -> dict[int, Cost]:
        """The cost of the backbone in evaluation mode, by stitch id."""
        return self._costs(self._evaluated_taps, input_shape)

    def training_costs(self) -> dict[int, Cost]:
        """The cost of the backbone at ``img_size`` with the taps of training, by stitch id."""
        return self._costs(self._trained_taps)

    def _costs(self, taps: Sequence[int] | None, input_shape: tuple[int, int] | None = None) -> dict[int, Cost]:
        model, largest = self.cost_model(input_shape), self.network.anchor(-1)
        norms = self.tap_norms.cost(tap_outlines(largest, taps or (), model.input_shape))
        return {id_: cost + norms for id_, cost in model.stitches(taps).items()}

    def trained_parameters(self, stitch: Stitch) -> tuple[nn.Parameter, ...]:
        """The trainable parameters that ``stitch`` uses in training mode, in order of first use."""
        parts = parts_run(self.space, stitch, self._trained_taps)
        used = dict.fromkeys(parameter for part in parts for parameter in part_parameters(self.network, part))
        return tuple(parameter for parameter in (*used, *self.tap_norms.parameters()) if parameter.requires_grad)

    def init_weights(self) -> None:
        """Apply ``init_cfg``, then load the anchors' pretrained weights.

        The anchors' weights are not loaded if ``init_cfg`` loads a checkpoint of the whole backbone. The runner calls
        this on each rank: rank 0 downloads files, and the other ranks wait and read them from the cache.
        """
        first = not self.is_init
        super().init_weights()
        configs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        if not first or any(config["type"] == "Pretrained" for config in configs):
            return
        try:
            if dist.is_main_process():
                load_anchors(self.network, self.pretrained)
        finally:
            dist.barrier()
        if not dist.is_main_process():
            load_anchors(self.network, self.pretrained)

    def forward(self, images: Tensor) -> Taps | Tensor:
        """Convert images (B, 3, H, W) to taps, or to logits (B, num_classes).

        Taps are one map (B, C, h, w) for each of ``out_indices``; a map that evaluation mode skips is None.

        Raises:
            RuntimeError: in training mode, the stitching layers are neither initialised nor loaded.
        """
        size = images.shape[-2], images.shape[-1]
        stitch = self._draw(size) if self.training else self._stitch
        walker = self._step if self.training else self._shared
        if self.num_classes is not None:
            return self.network.classify(images, stitch, walker)
        self._padding_warning(size, self.padded_size(size))
        out_indices = self.taps.train if self.training else self.taps.test
        features = self.network.taps(images, stitch, out_indices, walker)
        return self.taps.hand_out(self.tap_norms(dict(zip(out_indices, features, strict=True))))

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size (height, width) of images of ``image_size`` after padding to whole patches."""
        return self.network.anchor(-1).padded_size(image_size)

    def zeros(self, images: Tensor) -> Taps | Tensor:
        """Zeros in the shapes of evaluation mode's results for images (B, 3, H, W); no block runs."""
        if self.num_classes is not None:
            return images.new_zeros(len(images), self.num_classes)
        return self.taps.zeros(self.network.anchor(-1), images)

    def _draw(self, image_size: tuple[int, int]) -> Stitch:
        if self.drawn is None:
            check_first_draw(self.network, image_size, self.img_size)
        if self._step is not None:
            self._step.begin()
        self.drawn = self.space[self.sampler().draw(self.draws)]
        self.draws += 1
        return self.drawn

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.draws = int(state_dict.pop(prefix + DRAWS, self.draws))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _save_draws(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    assert isinstance(module, StitchedBackbone)
    state_dict[prefix + DRAWS] = torch.tensor(module.draws)
