"""The interface of an anchor: a pretrained model as stem, blocks and classifier."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmsnnet.errors import SettingError
from mmsnnet.stitching.anchors.positions import StoredPositions
from mmsnnet.stitching.features import Features, Layout


@dataclass(frozen=True, slots=True)
class Component:
    """A component of an anchor.

    Attributes:
        role: ``'stem'``, ``'block'``, ``'shared'`` (used by several blocks, such as the frequencies of a rotary
            embedding), ``'norm'`` (a plain ViT's final norm, which a route may skip) or ``'classifier'``.
        block: the index of the block, for the role ``'block'``.
    """

    role: str
    block: int = 0


STEM, SHARED, NORM, CLASSIFIER = Component("stem"), Component("shared"), Component("norm"), Component("classifier")


class BlockNames(NamedTuple):
    """The names of a block's modules in its model.

    What leads into a stage (``entry``: a downsampling) belongs to its first block, what ends a stage (``exit``: a norm)
    to its last one. So what leaves a block always enters the next one.
    """

    block: str
    entry: tuple[str, ...] = ()
    exit: tuple[str, ...] = ()

    @property
    def in_order(self) -> tuple[str, ...]:
        """All names, in the order in which the modules run."""
        return (*self.entry, self.block, *self.exit)


class Anchor(nn.Module, ABC):
    """A pretrained model as a stem, a flat sequence of blocks and a classifier.

    ``stem`` converts images to :class:`Features`, ``run`` runs blocks on them, and ``classify`` runs the model's norm,
    pooling and head. A subclass adapts one class of timm's models: it assigns the model's names to components, and
    calls its blocks.

    The table of components (:attr:`components`, :meth:`parameters_of`) is the only list of the model's parts. Cost,
    parameter counts, freezing, extraction, parameter groups, sharding and compilation all read it.

    Args:
        model: a timm model.
        classifier: keep the model's norm, pooling and head for :meth:`classify`. Otherwise they are dropped, because
            decode heads read the output of blocks.

    Attributes:
        stages: the number of blocks in each stage, including those that :meth:`keep` has dropped.
        compiled: whether the blocks are compiled for training mode (:mod:`mmsnnet.stitching.compilation`).
        norm_eval: whether training mode leaves batch norms in evaluation mode, so that they use and keep their running
            statistics. Their weights are still trained. :meth:`train` reads it.
        not_decayed: the names of the model's parameters that timm exempts from weight decay.
    """

    model: Any  # timm has no types
    stem_weight: str  # the name of the first convolution's weight (C, in_chans, kh, kw) in the model
    positions: StoredPositions | None = None  # what depends on the grid of a plain ViT's img_size

    def __init__(self, model: nn.Module, classifier: bool = False) -> None:
        super().__init__()
        self.model = model
        self.compiled = self.norm_eval = False
        # Asked for now: LeViT answers from its state dict, which a wrapped model would gather from all ranks.
        self.not_decayed = frozenset(getattr(self.model, "no_weight_decay", tuple)())
        self._frozen: tuple[Component, ...] = ()
        self._outline: tuple[Anchor, ...] = ()  # in a tuple, so that torch does not register it as a submodule
        self._geometries: dict[tuple[int, int], tuple[Features, ...]] = {}
        stages = self._name_blocks(model)
        self.stages = tuple(map(len, stages))
        self._blocks = tuple(names for stage in stages for names in stage)
        table: dict[Component, list[str]] = {STEM: []}
        for name, block in _top_names(model, self._blocks):
            first = name.partition(".")[0]
            others = SHARED if first in self._shared else CLASSIFIER if first in self.classifier_modules else STEM
            others = NORM if first == self._final_norm else others
            table.setdefault(others if block is None else Component("block", block), []).append(name)
        self._names: dict[Component, tuple[str, ...]] = {part: tuple(names) for part, names in table.items()}
        if not classifier:
            self._drop(NORM)
            self._drop(CLASSIFIER)

    # Subclasses implement these for their class of models.

    _shared: tuple[str, ...] = ()  # the model's modules that several blocks use
    classifier_modules: tuple[str, ...]  # and those of its classifier; what is left is the stem
    _final_norm: str = ""  # the one of those that runs on all tokens first, and that a route may skip

    @staticmethod
    @abstractmethod
    def _name_blocks(model: nn.Module) -> list[list[BlockNames]]:
        """The names of the blocks of each stage."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """The number of output channels of each block."""

    @property
    @abstractmethod
    def agreement(self) -> Mapping[str, object]:
        """Properties that must be equal in all anchors of a network, by name."""

    @abstractmethod
    def layout(self, block: int | None = None) -> Layout:
        """The layout of a block's input and output, or the layout of the stem's output."""

    @abstractmethod
    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size (height, width) to which :meth:`stem` pads images of ``image_size``."""

    @abstractmethod
    def call(self, block: int, features: Features) -> Features:
        """Run one block on features in the layout of that block."""

    @abstractmethod
    def _embed(self, images: Tensor) -> Features:
        """Convert images (B, in_chans, H, W) to features."""

    @abstractmethod
    def _classify(self, features: Features) -> Tensor:
        """Convert features in the stem's layout to logits (B, classes), without :attr:`_final_norm`."""

    # All anchors share these.

    @property
    def in_chans(self) -> int:
        """The number of channels of the images."""
        return self.model.get_submodule(self.stem_weight.removesuffix(".weight")).in_channels

    @property
    def depth(self) -> int:
        """The number of blocks, including those that :meth:`keep` has dropped."""
        return len(self._blocks)

    @property
    def components(self) -> tuple[Component, ...]:
        """The components of the anchor, without dropped ones."""
        return tuple(self._names)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The indices of the blocks, without dropped ones."""
        return tuple(component.block for component in self._names if component.role == "block")

    def block(self, index: int) -> nn.Module:
        """The timm module of block ``index``, without what leads into a stage or ends it."""
        return self.model.get_submodule(self._blocks[index].block)

    def _modules_of(self, component: Component) -> list[nn.Module]:
        """The modules of a component, without its bare tensors; none if the anchor lacks it."""
        return [part for part in self._parts_of(component) if isinstance(part, nn.Module)]

    def parameters_of(self, component: Component) -> list[nn.Parameter]:
        """The parameters of a component; none if the anchor lacks it."""
        parameters = [part for part in self._parts_of(component) if isinstance(part, nn.Parameter)]
        return parameters + [p for module in self._modules_of(component) for p in module.parameters()]

    def _parts_of(self, component: Component) -> list[Any]:
        return [getattr(_owner(self.model, name), _leaf(name)) for name in self._names.get(component, ())]

    def kind(self, block: int) -> Hashable:
        """A key that blocks share if their cost is the same and they can share compiled code."""
        module = self.block(block)
        return type(module), self.layout(block), *((name, p.shape) for name, p in module.named_parameters())

    def stem(self, images: Tensor) -> Features:
        """Embed patches and positions: convert images (B, in_chans, H, W) to features.

        Raises:
            SettingError: the images have another number of channels.
        """
        # A trace fixes the number of channels anyway, and this comparison would make it warn.
        if not torch.jit.is_tracing() and images.shape[1] != self.in_chans:
            raise SettingError(
                f"images of shape {tuple(images.shape)} have {images.shape[1]} channels, but the anchors take "
                f"{self.in_chans}: set in_chans={images.shape[1]} in every anchor, or load images with {self.in_chans} "
                "channels"
            )
        return self._embed(images)

    def run(
        self, features: Features, start: int = 0, stop: int | None = None, recompute: bool = False
    ) -> Iterator[tuple[int, Features]]:
        """Run the blocks [start, stop), all by default; yield each block's index and output.

        Args:
            features: the input of block ``start``, in any layout.
            recompute: recompute the activations of each block in the backward pass instead of keeping them.
        """
        for index in range(start, self.depth if stop is None else stop):
            features = features.to(self.layout(index))
            if recompute:
                features = self._call_recomputed(index, features)
            elif self.compiled and not self.training and not torch.compiler.is_compiling():
                # Measured figures must not depend on a compiler.
                with torch.compiler.set_stance("force_eager"):
                    features = self.call(index, features)
            else:
                features = self.call(index, features)
            yield index, features

    def _call_recomputed(self, block: int, features: Features) -> Features:
        # torch saves tensors only, and finds the device of the random state by them.
        grid = features.grid

        def call(data: Tensor) -> Tensor:
            nonlocal grid
            output = self.call(block, features.with_data(data))
            grid = output.grid
            return output.data

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _kept_statistics(self._modules_of(Component("block", block)))

        data = checkpoint(call, features.data, use_reentrant=False, context_fn=contexts)
        return Features(data, features.layout, grid)

    def classify(self, features: Features, skip_norm: bool = False) -> Tensor:
        """Run norm, pooling and head on the output of the last block: logits (B, classes).

        Args:
            features: the output of the last block, in any layout.
            skip_norm: leave out the norm of a plain ViT's tokens. Hierarchical models always run theirs.

        Raises:
            ValueError: the anchor was created without its classifier.
        """
        if CLASSIFIER not in self._names:
            raise ValueError("this anchor was created without its classifier: set classifier=True")
        features = features.to(self.layout())
        for norm in () if skip_norm else self._modules_of(NORM):
            features = features.with_data(norm(features.data))
        return self._classify(features)

    @torch.no_grad()
    def geometry(self, image_size: tuple[int, int]) -> tuple[Features, ...]:
        """The outputs of the stem and of each block for one image, without values.

        They are on the meta device, for an image of ``image_size`` (height, width).
        """
        if image_size not in self._geometries:
            outline = self.outline()
            features = outline.stem(torch.empty(1, self.in_chans, *image_size, device="meta"))
            self._geometries[image_size] = (features, *(output for _, output in outline.run(features)))
        return self._geometries[image_size]

    def outline(self) -> Anchor:
        """A weightless copy on the meta device, with the components that :meth:`keep` dropped."""
        return self._outline[0] if self._outline else self._weightless()

    def _weightless(self) -> Anchor:
        memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in self.buffers()}
        for parameter in self.parameters():
            empty = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        return copy.deepcopy(self, memo).float().eval()  # shapes matter, whatever the precision of the weights

    def freeze(self, blocks: int | None = None) -> None:
        """Freeze the stem and the first ``blocks`` blocks; None freezes the whole anchor.

        Frozen parameters get no gradient, and :meth:`train` leaves frozen modules in evaluation mode.
        """
        self._frozen = tuple(
            component
            for component in self._names
            if blocks is None or component in (STEM, SHARED) or (component.role == "block" and component.block < blocks)
        )
        for component in self._frozen:
            for parameter in self.parameters_of(component):
                parameter.requires_grad = False
        self.train(self.training)

    def train(self, mode: bool = True) -> Anchor:
        super().train(mode)
        # By name, because a conversion to SyncBatchNorm replaces modules.
        for module in (module for component in self._frozen for module in self._modules_of(component)):
            module.eval()
        if self._frozen and self._names.keys() <= set(self._frozen):
            self.model.eval()
        for module in self.modules() if self.norm_eval else ():
            if isinstance(module, _BatchNorm):
                module.eval()
        self._restore_activations()
        return self

    def _restore_activations(self) -> None:
        """Give timm's norms their activation back, which the conversions of torch and mmengine to SyncBatchNorm lose.

        A conversion replaces modules without a call of ours; the next one is :meth:`train`.
        """
        for module in self.modules():
            if type(module) is nn.SyncBatchNorm and hasattr(module, "act"):
                module.__class__ = SyncBatchNormAct

    def keep(self, components: Collection[Component]) -> None:
        """Drop all other components.

        Kept components keep their indices and names, and :meth:`geometry` still describes the whole model.
        """
        if not self._outline:
            self._outline = (self._weightless(),)
        shared = {SHARED} if any(component.role == "block" for component in components) else set()
        for component in [c for c in self._names if c not in {*components, *shared}]:
            self._drop(component)

    def _drop(self, component: Component) -> None:
        for name in self._names.pop(component, ()):
            owner, leaf = _owner(self.model, name), _leaf(name)
            dropped = getattr(owner, leaf)
            if component == STEM:
                _drop_tensors(owner, leaf)
            elif isinstance(dropped, nn.Module) and component != SHARED:
                setattr(owner, leaf, nn.Identity())
            else:
                setattr(owner, leaf, None)


@contextmanager
def _kept_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Leave the running statistics of batch norms unchanged: the first pass has updated them."""
    norms = [norm for module in modules for norm in module.modules() if isinstance(norm, _BatchNorm)]
    settings = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in settings:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _top_names(model: nn.Module, blocks: Sequence[BlockNames]) -> Iterator[tuple[str, int | None]]:
    """Yield the names of a model's direct tensors and submodules, and of each block's modules with the block's index.

    They have the order of ``named_parameters``.
    """
    for name, _ in (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)):
        yield name, None
    parts = [(part, index) for index, names in enumerate(blocks) for part in names.in_order]
    for child, _ in model.named_children():
        inner = [(part, index) for part, index in parts if part.startswith(f"{child}.")]
        yield from inner
        if not inner:
            yield child, None


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _drop_tensors(owner: nn.Module, name: str) -> None:
    """Set a tensor, or all tensors of a module, to None."""
    part = getattr(owner, name)
    if not isinstance(part, nn.Module):
        setattr(owner, name, None)
        return
    # The modules of a stem stay: patch and image size are read from them.
    for module in part.modules():
        for tensor, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            setattr(module, tensor, None)
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False  # else it would expect its count in a state dict without versions
