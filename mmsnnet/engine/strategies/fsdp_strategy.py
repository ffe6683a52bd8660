from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from mmengine import dist
from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import clean_tensor_name

from mmsnnet.models.wrappers import StitchedFullyShardedDataParallel
from mmsnnet.registry import STRATEGIES

# Optimizers whose step looks at a parameter as a whole, where a process holds a piece of it.
NOT_ELEMENTWISE = ("Lamb", "Lars", "LARS", "Muon", "Adafactor", "SOAP", "Shampoo")


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """mmengine's ``FSDPStrategy`` for a stitched model, of mmengine's ``FlexibleRunner``::

        runner_type = "FlexibleRunner"
        strategy = dict(type="mmsnnet.FSDPStrategy")

    Beside what :class:`mmsnnet.models.StitchedFullyShardedDataParallel` does, gradients are clipped by the norm of the
    whole model's, not of the piece that a process holds, and a resumed run gets its optimizer state: mmengine's own
    passes it to torch in an order of arguments that torch has given up (2.1). A run that began without FSDP is
    resumed with it too, and the other way about.

    Args:
        model_wrapper: settings of the wrapper, ``mmsnnet.StitchedFullyShardedDataParallel``.
        state_dict_cfg: ``'full'``: the first process writes checkpoints, with the weights that any runner loads.
        kwargs: as of mmengine's.

    Raises:
        TypeError: ``model_wrapper`` is of another type.
        ValueError: there is one process only; ``state_dict_cfg`` is another; the optimizer's step is not elementwise
            (LAMB).
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
                f"strategy.state_dict_cfg={state_dict_cfg!r} writes a file of pieces for each process, which nothing "
                "else can load: leave it out, for whole checkpoints"
            )
        wrapper = {"type": "mmsnnet.StitchedFullyShardedDataParallel", **(model_wrapper or {})}
        super().__init__(model_wrapper=wrapper, state_dict_cfg=state_dict_cfg, **kwargs)
        if self.world_size < 2:
            raise ValueError(
                "FSDP shares weights out over several processes, and this is one: bash tools/dist_train.sh CONFIG "
                "GPUS, or leave runner_type and strategy out of the config"
            )
        if get_device() == "cpu":  # where torch frees and overwrites what it takes for copies
            self.state_dict_config.offload_to_cpu = self.optim_state_dict_config.offload_to_cpu = False

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> OptimWrapper:
        if not isinstance(model, StitchedFullyShardedDataParallel):
            raise TypeError(
                f"mmsnnet.FSDPStrategy needs a model_wrapper of type mmsnnet.StitchedFullyShardedDataParallel, got "
                f"{type(model).__name__}"
            )
        if isinstance(optim_wrapper, Mapping):  # mmengine knows AmpOptimWrapper without a scope only
            kind = optim_wrapper.get("type")
            kind = OPTIM_WRAPPERS.get(kind) if isinstance(kind, str) else kind
            if isinstance(kind, type) and issubclass(kind, AmpOptimWrapper):
                optim_wrapper.setdefault("use_fsdp", True)
        built = super().build_optim_wrapper(optim_wrapper, model)
        name = type(built.optimizer).__name__
        if name in NOT_ELEMENTWISE:
            raise ValueError(
                f"{name} needs whole parameters for its step, of which FSDP gives each process a piece: train with "
                "AdamW or another elementwise optimizer"
            )
        if built.clip_grad_kwargs and built.clip_func is nn.utils.clip_grad_norm_:
            built._clip_grad = partial(_clip, model, built)
        built.optimizer.register_step_pre_hook(lambda *_: model.drop_unused_gradients())
        return built

    def optim_state_dict(self) -> dict[str, Any]:
        """The optimizer's state by parameter names, whole, and the state of the wrapper's own (a loss scale)."""
        with _declared_frozen(self._not_stepped()):
            state = FullyShardedDataParallel.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        return self._own_state(self.optim_wrapper.state_dict()) | state

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`optim_state_dict` gave, or the state of a run that was not sharded.

        Raises:
            ValueError: the parameters of that run are grouped otherwise.
        """
        named, optimizer = self._by_name(state_dict), self.optim_wrapper.optimizer
        state = FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, named)
        self.optim_wrapper.load_state_dict(self._own_state(state_dict) | state)

    def _by_name(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state with names for the numbers that parameters have in that of a run that was not sharded: their places
        in the groups, one group after the other."""
        groups = state_dict.get("param_groups", [])
        if not any(isinstance(key, int) for group in groups for key in group["params"]):
            return state_dict
        names = {parameter: clean_tensor_name(name) for name, parameter in self.model.named_parameters()}
        own_groups = self.optim_wrapper.optimizer.param_groups
        own = [[names[parameter] for parameter in group["params"]] for group in own_groups]
        if [len(group["params"]) for group in groups] != [len(group) for group in own]:
            raise ValueError(
                "the optimizer state of the checkpoint is of other groups of parameters than this run has: train with "
                "the optim_wrapper of that run, or begin from its weights alone, with --cfg-options "
                "load_from=CHECKPOINT and without --resume"
            )
        by_number = dict(enumerate(chain.from_iterable(own)))
        return dict(
            state={by_number[number]: state for number, state in state_dict["state"].items()},
            param_groups=[{**group, "params": params} for group, params in zip(groups, own, strict=True)],
        )

    def _not_stepped(self) -> list[nn.Parameter]:
        """The trained parameters that no stitch has used yet, in the same order everywhere: those for which no process
        has an optimizer state. A process has none either where its piece of a parameter is empty."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        states = self.optim_wrapper.optimizer.state
        stepped = torch.tensor([bool(states.get(parameter)) for parameter in trained], dtype=torch.uint8)
        dist.all_reduce(stepped, op="max")
        return [parameter for parameter, has_state in zip(trained, stepped.tolist(), strict=True) if not has_state]

    @staticmethod
    def _own_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}


@contextmanager
def _declared_frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """torch gathers the optimizer states of a unit only where every parameter of it has some, or is frozen."""
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


def _clip(model: StitchedFullyShardedDataParallel, wrapper: OptimWrapper) -> None:
    """What ``OptimWrapper._clip_grad`` does, on all processes: also on one whose piece has no gradients."""
    norm = model.clip_grad_norm_(**wrapper.clip_grad_kwargs)
    wrapper.message_hub.update_scalar(f"train/{wrapper.grad_name}", float(norm))
