from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timm.utils import adaptive_clip_grad
from torch import Size, nn
from torch.optim import SGD, Optimizer

from mmsnnet.engine.sharding import named_parameters, parameter_shapes
from mmsnnet.errors import SettingError
from mmsnnet.models import find_stitched_backbone
from mmsnnet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmsnnet.stitching import Anchor, StitchedNetwork
from mmsnnet.stitching.anchors.base import CLASSIFIER

DEFAULTS = dict(anchor_lr_mult=1.0, stitching_lr_mult=1.0, head_lr_mult=1.0, layer_decay_rate=1.0)
# Parameters with several dimensions that weight decay spares beside those that timm's models list, by the last part of
# their name: those of heads, and the tables that rel_pos_bias adds to plain ViTs.
NOT_DECAYED = ("bias", "pos_embed", "cls_token", "relative_position_bias_table")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class StitchOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups for a model with a stitched backbone.

    It serves any toolbox, and logs the groups as a table.

    The learning rate of a parameter is that of the optimizer, times

    - ``anchor_lr_mult`` in an anchor, and there also times ``layer_decay_rate ** (depth + 1 - layer)``, as in BEiT, MAE
      and ViTDet: layer 0 is the stem, layer ``i + 1`` block ``i`` with its relative-position bias, and layer
      ``depth + 1`` the norm after the last block. Each anchor counts its own layers;
    - ``stitching_lr_mult`` in a stitching layer;
    - ``head_lr_mult`` elsewhere: necks, decode heads, and the anchors' classification heads.

    Weight decay spares parameters with at most one dimension (biases, norms, layer scale) and those that timm's
    ``no_weight_decay`` of an anchor names: position embeddings, rotary frequencies, class and register tokens, tables
    of relative positions, the attention biases of LeViT. It also spares position embeddings and class tokens of heads.
    It acts on the low-rank updates of stitching layers, and so draws a layer towards its least-squares solution. Frozen
    parameters (frozen anchors, the base weights of stitching layers) are in no group.

    Args:
        optim_wrapper_cfg: the wrapper's config; its ``optimizer`` sets ``lr``. Beside mmengine's types of
            ``clip_grad``, ``dict(type='agc', clip_factor=0.01)`` is timm's adaptive gradient clipping (arXiv
            2102.06171): each row of a matrix, each output channel of a kernel and each vector gets a gradient of at
            most ``clip_factor`` times its own norm.
        paramwise_cfg: any of the four keys above, 1.0 by default; ``layer_decay_rate`` is at most 1.

    Raises:
        ValueError: ``paramwise_cfg`` or adaptive ``clip_grad`` has another key or a number out of range, or the
            optimizer sets no ``lr``.
        TypeError: a value is not a number.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        settings = dict(paramwise_cfg or {})
        unknown = [key for key in settings if key not in DEFAULTS]
        if unknown:
            raise ValueError(
                f"optim_wrapper.paramwise_cfg: unknown key {', '.join(map(repr, unknown))}; "
                f"mmsnnet.StitchOptimWrapperConstructor takes {', '.join(DEFAULTS)}"
            )
        for key, value in settings.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"optim_wrapper.paramwise_cfg.{key} must be a number, got {value!r}")
            if not 0 < float(value) < math.inf or (key == "layer_decay_rate" and float(value) > 1):
                allowed = "above 0 and at most 1" if key == "layer_decay_rate" else "above 0"
                raise ValueError(f"optim_wrapper.paramwise_cfg.{key} must be {allowed}, got {value}")
        # Never empty: without options, mmengine's class puts all parameters into one group, norms included.
        super().__init__(optim_wrapper_cfg, DEFAULTS | settings)
        if self.base_lr is None:
            raise ValueError("optim_wrapper.optimizer has no lr, which the rates of all parameter groups depend on")
        self._shapes: Mapping[nn.Parameter, Size] = {}
        # mmengine's wrappers refuse types of clipping that they do not know.
        self._adaptive_clipping = _adaptive_clipping(self.optim_wrapper_cfg.get("clip_grad"))
        if self._adaptive_clipping:
            del self.optim_wrapper_cfg["clip_grad"]

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper for a model, which may be wrapped for distributed training.

        Raises:
            TypeError: mmengine's own sharding wraps the model.
            ValueError: the optimizer needs gradients of all parameters: PyTorch's fused SGD with momentum.
        """
        self._shapes = parameter_shapes(model)
        wrapper = super().__call__(model)
        if self._adaptive_clipping:
            wrapper.clip_func, wrapper.clip_grad_kwargs = adaptive_clip_grad, self._adaptive_clipping
        _refuse_fused_momentum(wrapper.optimizer, model)
        if is_main_process():
            table = _table(wrapper.optimizer.param_groups, self._shapes)
            print_log(f"Groups of parameters:\n{table}", logger="current")
        return wrapper

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Append the groups of ``module`` to ``params``, one for each part, layer and decay.

        They are in the order of the model's parameters, so that a resumed optimizer finds its groups again.
        """
        network = find_stitched_backbone(module).network
        places, spared = self._backbone_places(network), _not_decayed(network)
        elsewhere = ("head", "", self.paramwise_cfg["head_lr_mult"])
        groups: dict[tuple[str, str, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            part, layer, lr_mult = places.get(parameter, elsewhere)
            decayed = (
                len(self._shapes[parameter]) > 1
                and parameter not in spared
                and name.rpartition(".")[2] not in NOT_DECAYED
            )
            group = dict(params=[], part=part, layer=layer, lr=self.base_lr * lr_mult)
            if not decayed:
                group["weight_decay"] = 0.0
            groups.setdefault((part, layer, decayed), group)["params"].append(parameter)
        params.extend(groups.values())

    def _backbone_places(self, network: StitchedNetwork) -> dict[nn.Parameter, tuple[str, str, float]]:
        """Part, layer and learning-rate factor of each parameter in anchors and stitching layers."""
        rate, lr_mult = self.paramwise_cfg["layer_decay_rate"], self.paramwise_cfg["anchor_lr_mult"]
        places = {
            p: ("stitching layers", "", self.paramwise_cfg["stitching_lr_mult"]) for p in network.layers.parameters()
        }
        for index in range(len(network.anchors)):
            anchor = network.anchor(index)
            for parameter, layer in _layers(anchor).items():
                # Without layer-wise decay, one group holds the whole anchor.
                label = {0: "stem", anchor.depth + 1: "norm"}.get(layer, f"block {layer - 1}") if rate < 1 else ""
                places[parameter] = (f"anchor {index}", label, lr_mult * rate ** (anchor.depth + 1 - layer))
        return places


def _adaptive_clipping(setting: Any) -> dict[str, float] | None:
    """The arguments of adaptive clipping in ``clip_grad``, or None for another type of clipping."""
    if not isinstance(setting, Mapping) or setting.get("type") != "agc":
        return None
    factor = setting.get("clip_factor")
    in_range = isinstance(factor, Real) and not isinstance(factor, bool) and 0 < float(factor) < math.inf
    if set(setting) != {"type", "clip_factor"} or not in_range:
        raise SettingError(
            "optim_wrapper.clip_grad of type 'agc' takes one more key, clip_factor, a number above 0; got "
            f"{dict(setting)}: set dict(type='agc', clip_factor=0.01)"
        )
    return dict(clip_factor=setting["clip_factor"])


def _not_decayed(network: StitchedNetwork) -> set[nn.Parameter]:
    """The parameters of the anchors that timm exempts from weight decay."""
    anchors = [network.anchor(index) for index in range(len(network.anchors))]
    return {p for anchor in anchors for name, p in named_parameters(anchor.model).items() if name in anchor.not_decayed}


def _refuse_fused_momentum(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse PyTorch's fused SGD with momentum.

    PyTorch 2.11 fails with a TypeError about NoneType in the step in which a parameter gets its first gradient later
    than others, maybe hours into a run.
    """
    several = len(find_stitched_backbone(model).space) > 1
    if several and isinstance(optimizer, SGD) and any(g["fused"] and g["momentum"] for g in optimizer.param_groups):
        raise ValueError(
            "PyTorch's SGD with momentum and fused=True needs the first gradients of all parameters in one step, but "
            "each stitch trains only some: set foreach=True in optim_wrapper.optimizer, or leave out fused"
        )


def _layers(anchor: Anchor) -> dict[nn.Parameter, int]:
    """The layer of each parameter of an anchor, the classification head left out."""
    # timm's distilled models have two heads.
    classifier = anchor.model.get_classifier() if CLASSIFIER in anchor.components else ()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    in_heads = {parameter for head in heads for parameter in head.parameters()}
    layers: dict[nn.Parameter, int] = {}
    for component in anchor.components:
        after = anchor.depth + 1
        layer = {"block": component.block + 1, "norm": after, "classifier": after}.get(component.role, 0)
        layers |= {parameter: layer for parameter in anchor.parameters_of(component) if parameter not in in_heads}
    return layers


def _table(groups: Sequence[dict[str, Any]], shapes: Mapping[nn.Parameter, Size]) -> str:
    with_layers = any(group["layer"] for group in groups)
    table = Table(box=SIMPLE_HEAD)
    for column in ("part", "layer") if with_layers else ("part",):
        table.add_column(column)
    for column in ("lr", "weight decay", "tensors", "parameters"):
        table.add_column(column, justify="right")
    for group in groups:
        size = sum(math.prod(shapes[parameter]) for parameter in group["params"])
        names = [group["part"], group["layer"]] if with_layers else [group["part"]]
        numbers = (f"{group['lr']:.3g}", f"{group['weight_decay']:.3g}", f"{len(group['params'])}", f"{size:,}")
        table.add_row(*names, *numbers)
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    return out.getvalue().rstrip()
