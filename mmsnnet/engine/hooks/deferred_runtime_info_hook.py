from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mmsnnet.engine.hooks.device_scalars import DeviceScalars
from mmsnnet.registry import HOOKS

# A run that nobody logs fetches its numbers every so many steps all the same, so that they do not pile up.
MOST_STEPS = 1000


@HOOKS.register_module()
class DeferredRuntimeInfoHook(RuntimeInfoHook):
    """mmengine's ``RuntimeInfoHook`` without its wait for the device in each iteration. It takes that hook's place:
    ``default_hooks=dict(runtime_info=dict(type='mmsnnet.DeferredRuntimeInfoHook'))``.

    mmengine reads each loss, and the norm of the gradients where they are clipped, as soon as it is queued, so that the
    next iteration is only queued when this one is done. Here they stay on the device, and the message hub's histories
    fetch them all at once when somebody reads one: the logger when it is due, a checkpoint, any other hook. Whoever
    reads finds what mmengine would have put there, to the bit.
    """

    def __init__(self) -> None:
        self._pending = DeviceScalars()
        self._histories: dict[str, DeferredHistory] = {}

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        wrappers = runner.optim_wrapper
        for wrapper in wrappers.values() if isinstance(wrappers, OptimWrapperDict) else (wrappers,):
            if getattr(wrapper, "clip_func", None) is clip_grad_norm_:
                wrapper.clip_func = partial(self._clip, wrapper.message_hub)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        if outputs is not None:
            self._record(runner.message_hub, {f"train/{name}": value for name, value in outputs.items()})

    def _clip(self, hub: MessageHub, parameters: Iterable[Tensor], **kwargs: Any) -> None:
        """Clips, and returns None, from which mmengine's wrapper sees that there is nothing left to log."""
        self._record(hub, {"train/grad_norm": clip_grad_norm_(parameters, **kwargs)})

    def _record(self, hub: MessageHub, scalars: Mapping[str, Any]) -> None:
        known = {}
        for name, value in scalars.items():
            history = hub.log_scalars.get(name)
            if history is not None and history is self._histories.get(name):
                known[name] = value
                continue
            # New, or taken over from a checkpoint: the hub adds this one value itself, as it always does.
            hub.update_scalar(name, value)
            self._histories[name] = hub.log_scalars[name] = DeferredHistory(hub.log_scalars[name], self._fetch)
        if known:
            self._pending.put(known)
        if len(self._pending) >= MOST_STEPS:
            self._fetch()

    def _fetch(self) -> None:
        if not len(self._pending):
            return
        values: dict[str, list[int | float]] = {}
        for step in self._pending.fetch():
            for name, value in step.items():
                values.setdefault(name, []).append(value)
        for name, new in values.items():
            self._histories[name].extend(new)


class DeferredHistory(HistoryBuffer):
    """A history whose latest values may not have been fetched yet: reading it calls ``fetch``, which adds them with
    :meth:`extend`. Copied or pickled it is mmengine's own, so that checkpoints are what they always were.

    Args:
        history: what it goes on from.
        fetch: adds what there is to every history that lacks some.
    """

    def __init__(self, history: HistoryBuffer, fetch: Callable[[], None]) -> None:
        values, counts = history.data
        super().__init__(values, counts, history.max_length)
        self._fetch = fetch

    @property
    def _log_history(self) -> np.ndarray:
        self._fetch()
        return self._values

    @_log_history.setter
    def _log_history(self, values: np.ndarray) -> None:
        self._values = values

    @property
    def _count_history(self) -> np.ndarray:
        self._fetch()
        return self._counts

    @_count_history.setter
    def _count_history(self, counts: np.ndarray) -> None:
        self._counts = counts

    def extend(self, values: list[int | float]) -> None:
        """Adds values that were fetched: as :meth:`update` with one after the other, in one go."""
        self._values = np.append(self._values, values)[-self.max_length :]
        self._counts = np.append(self._counts, [1] * len(values))[-self.max_length :]

    def __reduce__(self) -> tuple[Any, ...]:
        return HistoryBuffer, (*self.data, self.max_length)
