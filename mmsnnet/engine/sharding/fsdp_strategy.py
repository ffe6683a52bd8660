from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from mmengine import dist

# The package is private by its name only: mmengine documents this class for configs.
from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from timm.utils import adaptive_clip_grad
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

# torch names the entries of a sharded optimizer's state by this private function: names have to be compared by it.
from torch.distributed.fsdp._common_utils import clean_tensor_name

from mmsnnet.engine.mmengine_private import replace_clipping
from mmsnnet.engine.sharding.stitched_fully_sharded_data_parallel import StitchedFullyShardedDataParallel
from mmsnnet.errors import SettingError
from mmsnnet.registry import STRATEGIES

# Optimizers whose step needs a whole parameter, of which a rank holds only a part.
NOT_ELEMENTWISE = ("Lamb", "Lars", "LARS", "Muon", "Adafactor", "SOAP", "Shampoo")


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """mmengine's ``FSDPStrategy`` for a stitched model, with mmengine's ``FlexibleRunner``::

        runner_type = "FlexibleRunner"
        strategy = dict(type="mmsnnet.FSDPStrategy")

    It wraps the model in :class:`StitchedFullyShardedDataParallel`. Beyond mmengine's strategy:

    - gradients are clipped by the norm of the whole model's gradients, not of the part that a rank holds;
    - a resumed run gets its optimizer state (mmengine calls torch with an order of arguments that PyTorch 2.1 ended);
    - a run that began without FSDP can resume with it, and the other way round.

    Args:
        model_wrapper: settings of the wrapper, ``mmsnnet.StitchedFullyShardedDataParallel``.
        state_dict_cfg: ``'full'``: rank 0 writes checkpoints of the whole model, which any runner loads.
        kwargs: as of mmengine's.

    Raises:
        TypeError: ``model_wrapper`` has another type.
        ValueError: there is only one process; ``state_dict_cfg`` is not ``'full'``; the optimizer's step is not
            elementwise (LAMB); or gradients are clipped adaptively.
    """

    def __init__(
        self,
        *,
        model_wrapper: Mapping[str, Any] | None = None,
        state_dict_cfg: str = "full",
        **kwargs: Any,
    ) -> None:
        if state_dict_cfg != "full":
            raise ValueError(
                f"strategy.state_dict_cfg={state_dict_cfg!r} writes one file for each rank, which nothing else can "
                "load: leave it out, to write whole checkpoints"
            )
        wrapper = {"type": "mmsnnet.StitchedFullyShardedDataParallel", **(model_wrapper or {})}
        super().__init__(model_wrapper=wrapper, state_dict_cfg=state_dict_cfg, **kwargs)
        if self.world_size < 2:
            raise ValueError(
                "FSDP shards weights over several processes, and this is the only one: run bash tools/dist_train.sh "
                "CONFIG GPUS, or leave runner_type and strategy out of the config"
            )
        if get_device() == "cpu":  # torch's offloading frees tensors that on a CPU are no copies
            self.state_dict_config.offload_to_cpu = self.optim_state_dict_config.offload_to_cpu = False

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> OptimWrapper:
        if not isinstance(model, StitchedFullyShardedDataParallel):
            raise TypeError(
                f"mmsnnet.FSDPStrategy needs a model_wrapper of type mmsnnet.StitchedFullyShardedDataParallel, got "
                f"{type(model).__name__}"
            )
        if isinstance(optim_wrapper, dict):  # mmengine recognises AmpOptimWrapper only without a scope
            wrapper_type = optim_wrapper.get("type")
            wrapper_type = OPTIM_WRAPPERS.get(wrapper_type) if isinstance(wrapper_type, str) else wrapper_type
            if isinstance(wrapper_type, type) and issubclass(wrapper_type, AmpOptimWrapper):
                optim_wrapper.setdefault("use_fsdp", True)
        built = super().build_optim_wrapper(optim_wrapper, model)
        name = type(built.optimizer).__name__
        if name in NOT_ELEMENTWISE:
            raise ValueError(
                f"{name} needs whole parameters for its step, but FSDP gives each rank a part of them: train with "
                "AdamW or another elementwise optimizer"
            )
        if built.clip_grad_kwargs and built.clip_func is adaptive_clip_grad:
            raise SettingError(
                "optim_wrapper.clip_grad of type 'agc' compares rows of whole parameters, but FSDP gives each rank a "
                "part of them: clip by the norm, dict(max_norm=1.0), or leave out runner_type and strategy"
            )
        if built.clip_grad_kwargs and built.clip_func is nn.utils.clip_grad_norm_:
            replace_clipping(built, partial(_clip, model, built))
        built.optimizer.register_step_pre_hook(lambda *_: model.drop_unused_gradients())
        return built

    def optim_state_dict(self) -> dict[str, Any]:
        """The whole optimizer state by parameter names, and the wrapper's state (a loss scale)."""
        with _frozen(self._never_stepped()):
            state = FullyShardedDataParallel.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        return _wrapper_state(self.optim_wrapper.state_dict()) | state

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a run, sharded or not.

        Raises:
            ValueError: that run groups its parameters differently.
        """
        named, optimizer = self._by_name(state_dict), self.optim_wrapper.optimizer
        state = FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, named)
        self.optim_wrapper.load_state_dict(_wrapper_state(state_dict) | state)

    def _by_name(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The optimizer state with parameters by name.

        A run without sharding has them by their place in the groups.
        """
        groups = state_dict.get("param_groups", [])
        if not any(isinstance(key, int) for group in groups for key in group["params"]):
            return state_dict
        names = {parameter: clean_tensor_name(name) for name, parameter in self.model.named_parameters()}
        names_of_groups = [
            [names[parameter] for parameter in group["params"]] for group in self.optim_wrapper.optimizer.param_groups
        ]
        if [len(group["params"]) for group in groups] != [len(group) for group in names_of_groups]:
            raise ValueError(
                "the checkpoint's optimizer state has other groups of parameters than this run: set optim_wrapper as "
                "in that run, or start from the weights alone, with --cfg-options load_from=CHECKPOINT and without "
                "--resume"
            )
        by_number = dict(enumerate(chain.from_iterable(names_of_groups)))
        return dict(
            state={by_number[number]: state for number, state in state_dict["state"].items()},
            param_groups=[{**group, "params": params} for group, params in zip(groups, names_of_groups, strict=True)],
        )

    def _never_stepped(self) -> list[nn.Parameter]:
        """The trained parameters without optimizer state on any rank.

        They are in the same order on every rank. A single rank also lacks the state of a parameter if its part of the
        parameter is empty.
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        states = self.optim_wrapper.optimizer.state
        stepped = torch.tensor([bool(states.get(parameter)) for parameter in trained], dtype=torch.uint8)
        dist.all_reduce(stepped, op="max")
        return [parameter for parameter, has_state in zip(trained, stepped.tolist(), strict=True) if not has_state]


def _wrapper_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters count as frozen.

    torch gathers the states of a unit only if all its trained parameters have one.
    """
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


def _clip(model: StitchedFullyShardedDataParallel, wrapper: OptimWrapper) -> None:
    """Clip and log as ``OptimWrapper`` does, but together on all ranks.

    A rank takes part even if its part of the model has no gradient.
    """
    norm = model.clip_grad_norm_(**wrapper.clip_grad_kwargs)
    wrapper.message_hub.update_scalar(f"train/{wrapper.grad_name}", float(norm))
