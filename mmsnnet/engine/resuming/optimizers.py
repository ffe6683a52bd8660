from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from torch import Tensor, nn
from torch.optim import Optimizer

from mmsnnet.engine.resuming.difference import Difference, is_number, kept, refused, replaced
from mmsnnet.engine.sharding import named_parameters, parameter_shapes

Group = Mapping[str, Any]

# The entries of a parameter group that are no hyperparameters.
LABELS = ("params", "part", "layer")
# State that torch's optimizers keep in the shape of its parameter, which fused kernels do not check.
LIKE_PARAMETER = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "prev", "step_size", "ax"),
)
# Those of them that sums and averages of squares fill.
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum")


def named_wrappers(optim_wrapper: OptimWrapper | OptimWrapperDict) -> dict[str, OptimWrapper]:
    """The optimizer wrappers of a run by their settings."""
    if isinstance(optim_wrapper, OptimWrapperDict):
        return {f"optim_wrapper.{name}": wrapper for name, wrapper in optim_wrapper.items()}
    return {"optim_wrapper": optim_wrapper}


def compare_optimizers(
    model: nn.Module,
    optim_wrapper: OptimWrapper | OptimWrapperDict,
    state_dict: Mapping[str, Any] | None,
    types: Mapping[str, str],
    iterations: int = 0,
) -> Iterator[Difference]:
    """Compare a checkpoint's optimizer state with the optimizers of a run.

    Args:
        state_dict: the ``optimizer`` of the checkpoint; None where it has none.
        types: the recorded types of the optimizers by their settings; empty for an older checkpoint.
        iterations: of the run that saved the checkpoint.
    """
    if not state_dict:
        yield refused(
            "optim_wrapper: the checkpoint has no optimizer state (it was saved with save_optimizer=False, as "
            "save_best saves the best one)"
        )
        return
    wrappers = named_wrappers(optim_wrapper)
    if "param_groups" in state_dict:
        states = {"optim_wrapper": state_dict}
    else:
        states = {f"optim_wrapper.{name}": state for name, state in state_dict.items()}
    if states.keys() != wrappers.keys():
        yield refused(
            f"optim_wrapper: the checkpoint has the state of {', '.join(states)}, the config has {', '.join(wrappers)}"
        )
        return
    for setting, wrapper in wrappers.items():
        state = states[setting]
        optimizer = wrapper.optimizer
        base = state.get("base_param_settings")
        fault = (
            _find_other_groups(optimizer, state, types.get(setting))
            or _find_damage(optimizer, state, iterations)
            or _find_wrong_hyperparameters(optimizer, state)
            or _find_wrong_moments(optimizer, state, model)
        )
        if base is not None and not (isinstance(base, Mapping) and is_number(base.get("lr"))):
            fault = ": base_param_settings in the checkpoint has no lr"
        if fault is not None:
            yield refused(f"{setting}{fault}")
            continue
        yield from _compare_hyperparameters(setting, optimizer.param_groups, state["param_groups"])
        had_scaler, has_scaler = "loss_scaler" in state, isinstance(wrapper, AmpOptimWrapper)
        if had_scaler != has_scaler:
            precisions = {True: "mixed precision", False: "full precision"}
            yield replaced(f"{setting}.type", precisions[had_scaler], precisions[has_scaler])


def _find_other_groups(optimizer: Optimizer, state_dict: Group, recorded_type: str | None) -> str | None:
    """Say how a state is of another optimizer or other groups.

    torch loads any state with as many parameters, in their order.
    """
    saved_groups, groups, own_type = state_dict["param_groups"], optimizer.param_groups, type(optimizer).__name__
    if recorded_type is not None and recorded_type != own_type:
        return f".optimizer.type: the checkpoint's is {recorded_type}, the config's {own_type}"
    if recorded_type is None and (foreign := _foreign_keys(saved_groups, groups)):
        others = ", ".join(foreign)
        return f".optimizer.type: the checkpoint's is another one than the config's {own_type} (it has {others})"
    hint = "(see paramwise_cfg, constructor and frozen_stages)"
    if len(saved_groups) != len(groups):
        return f": the checkpoint has {len(saved_groups)} groups of parameters, the config makes {len(groups)} {hint}"
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            return (
                f": {_label(group, index)} has {len(saved['params'])} parameters in the checkpoint and "
                f"{len(group['params'])} by the config {hint}"
            )
    return None


def _find_damage(optimizer: Optimizer, state_dict: Group, iterations: int) -> str | None:
    """Name what an optimizer's state lacks: without its moments it would start anew, or fail in the first step."""
    states, keys = state_dict["state"], [key for group in state_dict["param_groups"] for key in group["params"]]
    if len(set(keys)) < len(keys) or any("lr" not in group for group in state_dict["param_groups"]):
        return ": a group of parameters in the checkpoint has one twice, or no lr"
    if not all(isinstance(state, Mapping) for state in states.values()):
        return ": an entry of the optimizer state in the checkpoint is no dict"
    keeps_moments = any(
        group.get("momentum") or group.keys() & {"betas", "beta1", "alpha", "rho", "lr_decay"}
        for group in optimizer.param_groups
    )
    if iterations and keys and not states.keys() & set(keys) and keeps_moments:
        return ": the checkpoint has no moments of the optimizer"
    # torch's Adafactor, like the optimizers of other libraries, keeps other state of vectors than of matrices.
    if not type(optimizer).__module__.startswith("torch.optim") or type(optimizer).__name__ == "Adafactor":
        return None
    for group in state_dict["param_groups"]:
        members = [states[key] for key in group["params"] if key in states]
        names = set().union(*members)
        lacking = {name for state in members for name in names if state.get(name) is None} - {"momentum_buffer"}
        if group.get("amsgrad") and members and "max_exp_avg_sq" not in names:
            return ": the checkpoint has amsgrad without max_exp_avg_sq"
        if lacking:  # SGD records a buffer of None if it has no momentum
            return f": {', '.join(sorted(map(str, lacking)))} of some parameters is missing in the checkpoint"
    return None


def _find_wrong_hyperparameters(optimizer: Optimizer, state_dict: Group) -> str | None:
    """Name a number of a group that is not finite, or what the optimizer's constructor says of a group."""
    names = inspect.signature(type(optimizer)).parameters.keys() - {"params"}
    for index, (saved, group) in enumerate(zip(state_dict["param_groups"], optimizer.param_groups, strict=True)):
        for key in (saved.keys() & group.keys()) - set(LABELS):
            values = [one if isinstance(one, list | tuple) else [one] for one in (saved[key], group[key])]
            if len(values[0]) != len(values[1]) or (isinstance(group[key], bool) and type(saved[key]) is not bool):
                return f": {key} of {_label(group, index)} in the checkpoint is of another kind"
            for recorded, configured in zip(*values, strict=True):
                if is_number(configured) and not (is_number(recorded) and math.isfinite(recorded)):
                    return f": {key} of {_label(group, index)} in the checkpoint is no finite number"
        try:
            type(optimizer)(group["params"][:1], **{name: saved[name] for name in names & saved.keys()})
        except TypeError:  # it needs what groups do not record, like ZeroRedundancyOptimizer
            continue
        except ValueError as error:
            return f": {_label(group, index)} in the checkpoint is wrong ({error})"
    return None


def _find_wrong_moments(optimizer: Optimizer, state_dict: Group, model: nn.Module) -> str | None:
    """Name state tensors that no step writes, or of another shape than their parameter's.

    A fused kernel would read beyond the end of the latter.
    """
    parameters, shapes = named_parameters(model), parameter_shapes(model)
    names = {parameter: name for name, parameter in parameters.items()}
    misshapen, wrong = [], []
    for key, parameter in _pairs(optimizer, state_dict):
        parameter = parameters.get(key, parameter) if isinstance(key, str) else parameter
        shape = tuple(shapes.get(parameter, parameter.shape))
        label = names.get(parameter, "a parameter outside the model")
        for name, value in state_dict["state"].get(key, {}).items():
            if name == "step" and not (is_number(value) and 0 <= float(value) < math.inf):
                wrong.append(f"{name} of {label}")
            if name not in LIKE_PARAMETER or value is None:
                continue
            if not isinstance(value, Tensor):
                wrong.append(f"{name} of {label}")
            elif value.layout != torch.strided or value.shape != shape:
                misshapen.append(f"{name} {tuple(value.shape)} for {label} {shape}")
            elif not value.is_floating_point() or not value.isfinite().all() or (name in SQUARES and (value < 0).any()):
                wrong.append(f"{name} of {label}")
    for fault, found in (
        ("optimizer state has another shape than its parameter", misshapen),
        ("optimizer state is not of finite floating-point numbers, or has a negative square", wrong),
    ):
        if found:
            return f": {fault}: {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    return None


def lay_out_states(optimizer: Optimizer, state_dict: Group) -> None:
    """Copy state tensors whose memory layout differs from their parameter's, in place.

    A fused kernel walks both in the order of memory, and a checkpoint keeps the layout of the run that wrote it:
    ``channels_last``, or one element for all of an expanded tensor.
    """
    for key, parameter in _pairs(optimizer, state_dict):
        state = state_dict["state"].get(key, {})
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if value.shape != parameter.shape:  # a scalar, a factored moment, or the parameter is sharded
                state[name] = value.contiguous()
            elif value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _pairs(optimizer: Optimizer, state_dict: Group) -> Iterator[tuple[Any, nn.Parameter]]:
    """The keys in a saved state, with torch's parameter for each."""
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        yield from zip(saved["params"], group["params"], strict=True)


def _foreign_keys(saved_groups: Sequence[Group], groups: Sequence[Group]) -> list[str]:
    """Hyperparameters that show that a checkpoint has another type of optimizer.

    If only one side has some that the other lacks, another version of torch may have added them.
    """
    saved, own = (
        {key for group in some for key in group if key not in LABELS and not key.startswith("initial_")}
        for some in (saved_groups, groups)
    )
    return sorted(saved - own) if own - saved else []


def _compare_hyperparameters(
    setting: str, groups: Sequence[Group], saved_groups: Sequence[Group]
) -> Iterator[Difference]:
    """Make one difference for each hyperparameter, however many groups it differs in."""
    for key in dict.fromkeys(chain.from_iterable(groups)):
        if key in LABELS or key.startswith("initial_"):
            continue
        differing = []
        for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
            if key in saved and key in group and key not in _scheduled_aliases(saved, group):
                recorded, configured = _initial(saved, key), _initial(group, key)
                if recorded != configured:
                    differing.append((_label(group, index), recorded, configured))
        if differing:
            label, recorded, configured = differing[0]
            where = f"{setting}.optimizer.{key}"
            if len(groups) > 1:
                where += f" in {len(differing)} of {len(groups)} groups of parameters, the first of them {label}"
            yield kept(where, _shown(recorded), _shown(configured))


def _scheduled_aliases(*groups: Group) -> tuple[str, ...]:
    """``betas``, if mmengine's momentum schedulers repeat them as ``momentum``."""
    return ("betas",) if any("betas" in group and "momentum" in group for group in groups) else ()


def _initial(group: Group, key: str) -> Any:
    """The value of a hyperparameter before any schedule changed it."""
    value = group.get(f"initial_{key}", group[key])
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _label(group: Group, index: int) -> str:
    """A group by its number and the names of ``StitchOptimWrapperConstructor``."""
    names = [str(group[name]) for name in ("part", "layer") if group.get(name)]
    return f"group {index}" + (f" ({', '.join(names)})" if names else "")
