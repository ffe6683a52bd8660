from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from torch import Tensor, nn
from torch.optim import Optimizer

from mmsnnet.engine.resuming.difference import Difference, Verdict, kept, refused, replaced
from mmsnnet.engine.sharding import clean_tensor_name, parameter_shapes
from mmsnnet.models.checkpoint import unwrapped_model

Group = Mapping[str, Any]

# What a group of parameters has beside hyperparameters.
LABELS = ("params", "part", "layer")


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
    """Compare the optimizer state in a checkpoint with the optimizers of a run.

    Args:
        state_dict: the ``optimizer`` of the checkpoint; None where there is none.
        types: the types of the optimizers that the checkpoint records, by their settings; of an older one, empty.
        iterations: how many the checkpoint was trained for.
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
    parameters = _Parameters(model)
    for setting, wrapper in wrappers.items():
        state = states[setting]
        differences = list(_compare_states(setting, wrapper.optimizer, state, types.get(setting), parameters))
        if not differences and iterations:
            differences += _lacking_state(setting, wrapper.optimizer, state)
        yield from differences
        if any(difference.verdict is Verdict.REFUSED for difference in differences):
            continue
        yield from _compare_hyperparameters(setting, wrapper.optimizer.param_groups, state["param_groups"])
        has_scaler, wants_scaler = "loss_scaler" in state, isinstance(wrapper, AmpOptimWrapper)
        if has_scaler != wants_scaler:
            precisions = {True: "mixed precision", False: "full precision"}
            yield replaced(f"{setting}.type", precisions[has_scaler], precisions[wants_scaler])


class _Parameters:
    """Names and whole shapes of a model's parameters, sharded or not."""

    def __init__(self, model: nn.Module) -> None:
        named = unwrapped_model(model).named_parameters()
        self.names = {parameter: clean_tensor_name(name) for name, parameter in named}
        self.by_name = {name: parameter for parameter, name in self.names.items()}
        self._shapes = parameter_shapes(model)

    def name(self, parameter: nn.Parameter) -> str:
        return self.names.get(parameter, "a parameter outside the model")

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(self._shapes.get(parameter, parameter.shape))


def _compare_states(
    setting: str, optimizer: Optimizer, state_dict: Group, recorded_type: str | None, parameters: _Parameters
) -> Iterator[Difference]:
    """Differences that make a state unfit for an optimizer. torch loads whatever has as many parameters, and a fused
    kernel reads beyond the end of a state that is too small."""
    groups, own_groups = state_dict["param_groups"], optimizer.param_groups
    own_type = type(optimizer).__name__
    if recorded_type is not None and recorded_type != own_type:
        yield refused(f"{setting}.optimizer.type: the checkpoint's is {recorded_type}, the config's {own_type}")
        return
    if recorded_type is None and (foreign := _foreign_keys(groups, own_groups)):
        yield refused(
            f"{setting}.optimizer.type: the checkpoint's is another one than the config's {own_type} (it has "
            f"{', '.join(foreign)})"
        )
        return
    if len(groups) != len(own_groups):
        yield refused(
            f"{setting}: the checkpoint has {len(groups)} groups of parameters, the config makes {len(own_groups)} "
            "(see paramwise_cfg, constructor and frozen_stages)"
        )
        return
    for index, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        if len(group["params"]) != len(own["params"]):
            yield refused(
                f"{setting}: {_label(own, index)} has {len(group['params'])} parameters in the checkpoint and "
                f"{len(own['params'])} by the config (see paramwise_cfg, constructor and frozen_stages)"
            )
            return
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) < len(keys) or not all(isinstance(group.get("lr"), Real | Tensor) for group in groups):
        yield refused(f"{setting}: the checkpoint's groups of parameters are damaged (a parameter twice, or no lr)")
        return
    probe = _Probe(optimizer)
    wrong = []
    for index, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        for key, at_place in zip(group["params"], own["params"], strict=True):
            parameter = parameters.by_name.get(key, at_place) if isinstance(key, str) else at_place
            shape, state = parameters.shape(parameter), state_dict["state"].get(key, {})
            wrong += [
                f"{fault} for {parameters.name(parameter)} {shape}"
                for fault in probe.faults(index, parameter, shape, state)
            ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        yield refused(f"{setting}: optimizer state in the checkpoint is not of its parameter's shape: {wrong[0]}{more}")


def _lacking_state(setting: str, optimizer: Optimizer, state_dict: Group) -> list[Difference]:
    """Refuse a state without entries, of an optimizer that has them once it has made a step."""
    names = _Probe(optimizer).names
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    if not names or not keys or any(key in state_dict["state"] for key in keys):
        return []
    return [refused(f"{setting}: the checkpoint has no optimizer state ({', '.join(sorted(names))})")]


def lay_out_states(optimizer: Optimizer, state_dict: Group) -> None:
    """Copy state tensors that lie in memory otherwise than their parameters, in place.

    A fused kernel walks both in the order of memory. A checkpoint keeps the order that it was saved with: another one
    after ``channels_last``, or one element for all of an expanded tensor.
    """
    for group, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for key, parameter in zip(group["params"], own["params"], strict=True):
            state = state_dict["state"].get(key, {})
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if value.shape != parameter.shape:  # a scalar, a factor, or of a parameter in shards
                    state[name] = value.contiguous()
                elif value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _foreign_keys(groups: Sequence[Group], own_groups: Sequence[Group]) -> list[str]:
    """The hyperparameters of a checkpoint that records no type of optimizer and is of another one.

    Where only one side has some that the other lacks, a version of torch may have added them.
    """
    given, own = (
        {key for group in some for key in group if key not in LABELS and not key.startswith("initial_")}
        for some in (groups, own_groups)
    )
    return sorted(given - own) if own - given else []


class _Probe:
    """The shapes of the state that an optimizer keeps of a parameter, from a step of a copy of it.

    A tensor in its parameter's shape needs no step. Scalars (a count of steps) are known from one step with a small
    parameter. Only an optimizer that keeps other shapes (Adafactor's factored moments) makes a step with each shape.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._known: dict[tuple[int, tuple[int, ...]], dict[str, tuple[int, ...]]] = {}
        groups = enumerate(optimizer.param_groups)
        first = next(((index, group["params"][0]) for index, group in groups if group["params"]), None)
        small = {} if first is None else self._shapes(*first, (2, 3))
        self._scalars = {name for name, shape in small.items() if shape in ((), (1,))} if small else {"step"}
        # The tensors that a parameter has once it has been trained.
        self.names = frozenset(small)

    def faults(self, index: int, parameter: nn.Parameter, shape: tuple[int, ...], state: Any) -> Iterator[str]:
        """What is wrong with the state of one parameter; a parameter that no step has trained yet has none."""
        if not isinstance(state, Mapping):
            yield f"a {type(state).__name__}"
            return
        for name in sorted(self.names) if state else ():
            value = state.get(name)
            is_count = name in self._scalars and isinstance(value, Real)
            if is_count or (isinstance(value, Tensor) and value.layout == torch.strided):
                continue
            if name in state:
                yield f"{name} is no dense tensor ({type(value).__name__})"
            elif name in self._shapes(index, parameter, shape):  # others have factored moments in its place
                yield f"{name} is missing"
        for name, value in state.items():
            if isinstance(value, Tensor) and not self.fits(index, parameter, shape, name, tuple(value.shape)):
                yield f"{name} {tuple(value.shape)}"

    def fits(
        self, index: int, parameter: nn.Parameter, shape: tuple[int, ...], name: str, found: tuple[int, ...]
    ) -> bool:
        if found == shape or (name in self._scalars and found in ((), (1,))):
            return True
        return self._shapes(index, parameter, shape).get(name) == found

    def _shapes(self, index: int, like: nn.Parameter, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes by name; empty where the optimizer cannot step like this."""
        key = (index, shape)
        if key not in self._known:
            probe = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
            probe.grad = torch.zeros_like(probe)
            twin = object.__new__(type(self._optimizer))
            group = {**self._optimizer.param_groups[index], "params": [probe]}
            state = dict(defaults=dict(self._optimizer.defaults), state=defaultdict(dict), param_groups=[group])
            try:
                # As unpickling makes one: a constructor may want other arguments than its defaults.
                twin.__setstate__(state)
                twin.step()
                values = twin.state[probe].items()
                self._known[key] = {name: tuple(value.shape) for name, value in values if isinstance(value, Tensor)}
            except Exception:  # whatever an optimizer of any type may raise; its state must have its parameters' shapes
                self._known[key] = {}
        return self._known[key]


def _compare_hyperparameters(
    setting: str, own_groups: Sequence[Group], groups: Sequence[Group]
) -> Iterator[Difference]:
    """One difference for each hyperparameter, however many groups of parameters it differs in."""
    for key in dict.fromkeys(chain.from_iterable(own_groups)):
        if key in LABELS or key.startswith("initial_"):
            continue
        differing = []
        for index, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
            if key in group and key in own and key not in _scheduled_aliases(own, group):
                recorded, configured = _initial(group, key), _initial(own, key)
                if recorded != configured:
                    differing.append((_label(own, index), recorded, configured))
        if differing:
            label, recorded, configured = differing[0]
            where = f"{setting}.optimizer.{key}"
            if len(own_groups) > 1:
                where += f" in {len(differing)} of {len(own_groups)} groups of parameters, the first of them {label}"
            yield kept(where, _shown(recorded), _shown(configured))


def _scheduled_aliases(*groups: Group) -> tuple[str, ...]:
    """mmengine's momentum schedulers keep the first of Adam's ``betas`` as ``momentum``, too, and change both."""
    return ("betas",) if any("betas" in group and "momentum" in group for group in groups) else ()


def _initial(group: Group, key: str) -> Any:
    """A hyperparameter before any schedule, so that it can be compared."""
    value = group.get(f"initial_{key}", group[key])
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _label(group: Group, index: int) -> str:
    """A group of parameters as ``StitchOptimWrapperConstructor`` names it, or else by its number."""
    names = [str(group[name]) for name in ("part", "layer") if group.get(name)]
    return f"group {index}" + (f" ({', '.join(names)})" if names else "")
