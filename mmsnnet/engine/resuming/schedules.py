from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.runner import EpochBasedTrainLoop

from mmsnnet.engine.mmengine_private import AnyRunner, training_loop
from mmsnnet.engine.resuming.difference import Difference, is_number, kept, noted, refused

State = Mapping[str, Any]

# State of a scheduler that is no constant: counters, and copies of the optimizer's values.
RUNNING = ("last_step", "verbose", "base_values", "best", "num_bad_epochs", "cooldown_counter")
# Constants that follow from others. A difference in those explains the difference in these.
DERIVED = {
    "total_iters": ("begin", "end"),
    "total_steps": ("begin", "end"),
    "T_max": ("begin", "end"),
    "cumulative_periods": ("periods",),
    "rule_worse": ("rule",),
}
# A learning rate below this share of the initial one trains nothing.
NEGLIGIBLE = 1e-6


def scheduler_types(param_schedulers: Any) -> dict[str, list[str]]:
    """The types of a run's schedulers by their settings."""
    return {
        setting: [type(scheduler).__name__ for scheduler in schedulers]
        for setting, schedulers in _by_setting(param_schedulers).items()
    }


def drop_functions(states: Any) -> None:
    """Remove functions from saved schedules: loading would refuse their pickles.

    ``OneCycleLR`` saves a function of its own. A schedule that loads a state without it keeps the one that it has.
    """
    for state in chain.from_iterable(_by_setting(states).values()):
        for key in [key for key, value in state.items() if callable(value)]:
            del state[key]


def compare_schedules(
    param_schedulers: Any, states: Any, recorded_types: Mapping[str, Sequence[str]]
) -> Iterator[Difference]:
    """Compare a checkpoint's schedules with a run's, in order, as mmengine does.

    Args:
        param_schedulers: the run's: a list, a dict of lists, or None.
        states: the ``param_schedulers`` of the checkpoint, in the same form.
        recorded_types: the types in the checkpoint, as :func:`scheduler_types` gives them; empty for an older one.
    """
    configured_schedules, recorded_schedules = _by_setting(param_schedulers), _by_setting(states)
    for setting in dict.fromkeys((*recorded_schedules, *configured_schedules)):
        schedulers, recorded = configured_schedules.get(setting, []), recorded_schedules.get(setting, [])
        names = [type(scheduler).__name__ for scheduler in schedulers]
        types = recorded_types.get(setting)
        if len(schedulers) != len(recorded):
            yield refused(
                f"{setting}: the checkpoint has {_counted(recorded, types)}, the config {_counted(schedulers, names)}"
            )
            continue
        for index, (scheduler, state) in enumerate(zip(schedulers, recorded, strict=True)):
            place, constants = f"{setting}[{index}]", scheduler.state_dict()
            if types is not None and types[index] != names[index]:
                yield refused(f"{place}.type: the checkpoint's is {types[index]}, the config's {names[index]}")
            elif _is_other_type(state, constants):
                yield refused(f"{place}.type: the checkpoint's is another one than the config's {names[index]}")
            elif foreign := [key for key in state.keys() - constants.keys() if hasattr(scheduler, str(key))]:
                yield refused(f"{place}.{foreign[0]}: the checkpoint replaces a part of the schedule")
            elif wrong := [key for key, value in constants.items() if _is_no_number(key, state.get(key, value), value)]:
                yield refused(f"{place}.{wrong[0]}: the checkpoint's is no number")
            else:
                yield from _compare_constants(place, state, constants)


def compare_progress(runner: AnyRunner, checkpoint: Mapping[str, Any]) -> Iterator[Difference]:
    """Note where nothing is left to train, or the rate is zero."""
    by_epoch = isinstance(training_loop(runner), EpochBasedTrainLoop)
    unit, setting = ("epoch", "train_cfg.max_epochs") if by_epoch else ("iter", "train_cfg.max_iters")
    done, end = checkpoint["meta"][unit], runner.max_epochs if by_epoch else runner.max_iters
    units = "epochs" if by_epoch else "iterations"
    if done == end:
        yield noted(f"{setting}: nothing is left to train: the checkpoint has {done} {units}; raise {setting} to go on")
        return
    states = checkpoint["optimizer"]
    states = {"optim_wrapper": states} if "param_groups" in states else states
    groups = [group for state in states.values() for group in state["param_groups"]]
    rates = [state for states in _by_setting(checkpoint.get("param_schedulers")).values() for state in states]
    rates = [state for state in rates if state.get("param_name") == "lr"]
    ended = bool(rates) and all(state["_global_step"] + 1 >= state["end"] for state in rates)
    if ended and all(float(group["lr"]) <= NEGLIGIBLE * float(group.get("initial_lr", 0)) for group in groups):
        last = max(state["end"] for state in rates)
        yield noted(
            f"param_scheduler: the checkpoint's schedule has ended (at {last}): the learning rate is 0 for "
            f"all {end - done} {units} that are left"
        )


def _by_setting(schedulers: Any) -> dict[str, list[Any]]:
    if isinstance(schedulers, Mapping):
        return {f"param_scheduler.{name}": list(some) for name, some in schedulers.items()}
    return {"param_scheduler": list(schedulers or ())}


def _counted(schedulers: Sequence[Any], types: Sequence[str] | None) -> str:
    if not schedulers:
        return "no schedule"
    number = f"{len(schedulers)} schedule{'s' * (len(schedulers) != 1)}"
    return f"{number} ({', '.join(types)})" if types else number


def _is_other_type(state: State, constants: State) -> bool:
    if state.get("param_name") != constants.get("param_name"):
        return True
    recorded, configured = ({key for key in one if not key.startswith("_")} for one in (state, constants))
    # If only one side has more, another version may have added them.
    return bool(recorded - configured and configured - recorded)


def _is_no_number(key: str, recorded: Any, configured: Any) -> bool:
    """Whether a recorded value is no number where a schedule has numbers, or lists of them."""
    values, expected = (one if isinstance(one, list) else [one] for one in (recorded, configured))
    if not all(value is None or is_number(value) for value in expected):
        return False
    # One of eta_min and eta_min_ratio is None.
    allows_none = None in expected or key.startswith("eta_min")
    return not all(is_number(value) or (value is None and allows_none) for value in values)


def _compare_constants(place: str, state: State, constants: State) -> Iterator[Difference]:
    differing = [
        key
        for key, value in constants.items()
        if key in state
        and not key.startswith("_")
        and key not in RUNNING
        and not callable(value)
        and _plain(value) != _plain(state[key])
    ]
    for key in differing:
        if not any(cause in differing for cause in DERIVED.get(key, ())):
            yield kept(f"{place}.{key}", _shown(state[key]), _shown(constants[key]))


def _plain(value: Any) -> Any:
    if isinstance(value, Counter):  # milestones
        value = sorted(value.elements())
    return tuple(value) if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    return "none" if value == INF else str(list(plain) if isinstance(plain := _plain(value), tuple) else plain)
