"""Watching an optimizer while it trains, without making it wait."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from os import PathLike
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..capture import is_captured
from ..control import SpectralOptimizer
from ..telling import outside
from ..tracker.common import STEP, wait_of
from .history import SpectralHistory
from .sinks import Sink, sinks_of
from .snapshot import Snapshot, check_norms

Target = str | PathLike[str] | Callable[[int, dict[str, dict[str, float]]], object]


class SpectralMonitor:
    """Notes what the tracker knows of every matrix, in the first step it sees and in every ``every``-th.

    A step of ours leaves sigma, residual and the rest in ``optimizer.state``, on the weights' device. The monitor
    copies them into pinned memory of the host behind the step's own work, looks in later steps whether they are there,
    and writes them out once they are: no step waits for the device. So what is written lags on a GPU, and
    :meth:`close`, which a ``with`` block calls, waits for the rest. On the CPU it is written at once.

    What is noted (``specopt.seeing.history.QUANTITIES``): ``sigma`` before the correction and ``sigma_after`` it,
    ``target``, ``residual``, ``valid``, ``capped``, ``pairs``; with ``weights`` also ``frobenius`` and ``stable_rank``,
    with ``gradients`` the gradients' norm. Convolutions under ``conv="operator"`` come behind the matrices, without a
    stable rank. All goes into :attr:`history` and to all that ``to`` names:

    - a path: a CSV file with a line for each step and matrix, continued where it exists; ``SpectralHistory.from_csv``
      reads it back.
    - an object with ``add_scalar``, such as ``torch.utils.tensorboard.SummaryWriter``: scalars ``sigma/layer.weight``.
    - a function, called with the step and ``{name: {quantity: value}}``, the gradient norm under the name ``(all)``;
      what is nan is left out.

    The monitor sees groups that are added later, a state that is loaded, and optimizers that :func:`specopt.wrap` made.
    Steps count on from those that the optimizer's state tells, also after ``load_state_dict``; :attr:`step` may be set,
    as where nothing in the state has counted them all: the base is SGD, and another ``block`` made its trackers anew.
    deepcopy and pickle give an optimizer that is not monitored. A replayed CUDA graph runs no hook: call
    :meth:`observe`. With several processes, give it to one of them. Of weights that are cut up over ranks it sends
    nothing; the residual is that of the step before, and ``weights`` and ``gradients`` cannot be asked for.

    A file that can no longer be written to (a full disk) ends with a warning, and the training goes on; an error of a
    function of yours is raised by the step.

    Args:
        optimizer: one of specopt's, or wrapped by it.
        every: steps from one record to the next.
        to: one of the above or several; nothing for :attr:`history` alone.
        weights: measure Frobenius norms, which reads every weight once in a step that is noted.
        gradients: measure the norm over the gradients of all parameters, as they are after the step, without a gradient
            scaler's factor; nan where one is sparse.
        keep: so many records stay in :attr:`history`; None for all.

    Raises:
        OSError, ValueError: a file that cannot be written to, or is another than a monitor's; before anything is run.
            Norms asked for of weights that are cut up over ranks; in a step, of such as were added since.
        TypeError: an optimizer of another kind, or something in ``to`` that is none of the above.

    Example::

        with specopt.SpectralMonitor(optimizer, every=100, to=["sigma.csv", SummaryWriter()]) as monitor:
            train()
        specopt.plots.spectral_norms(monitor.history, path="sigma.png")
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int = 100,
        to: Target | Any | Iterable[Target | Any] = (),
        *,
        weights: bool = False,
        gradients: bool = False,
        keep: int | None = None,
    ) -> None:
        spectral = _check_kind(optimizer)
        _check_count("every", every)
        if keep is not None:
            _check_count("keep", keep)
        check_norms(spectral, weights=weights, gradients=gradients)
        self.optimizer = optimizer
        self.every, self.weights, self.gradients = every, weights, gradients
        self.history = SpectralHistory(keep=keep)
        self.step = _steps_made(optimizer)
        """Steps that the optimizer has made."""
        self._sinks: list[Sink] = sinks_of(to)
        self._waiting: deque[Snapshot] = deque()
        self._has_seen = self._closed = False
        self._hooks = (
            optimizer.register_step_post_hook(_Hook(self._after_step)),
            optimizer.register_load_state_dict_post_hook(_Hook(self._after_loading)),
        )

    def observe(self) -> None:
        """Notes the step just made, whatever its number.

        Raises:
            RuntimeError: the monitor is closed.
            TypeError: the optimizer was unwrapped.
        """
        if self._closed:
            raise RuntimeError("the monitor is closed")
        snapshot = Snapshot.of(_check_kind(self.optimizer), self.step, weights=self.weights, gradients=self.gradients)
        self._waiting.append(snapshot)
        self._has_seen = True
        self._write_arrived()

    def close(self) -> None:
        """Waits for what is on its way, writes it, and lets go of the optimizer. Files are closed, writers are not."""
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
            while self._waiting:
                self._write(self._waiting.popleft())

    def __enter__(self) -> SpectralMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _after_step(self, optimizer: Any) -> None:
        self.step += 1
        if not isinstance(optimizer, SpectralOptimizer) or is_captured(optimizer):
            return
        if self.step % self.every == 0 or not self._has_seen:
            self.observe()
        else:
            self._write_arrived()

    def _after_loading(self, optimizer: Any) -> None:
        self.step = _steps_made(optimizer) or self.step

    def _write_arrived(self) -> None:
        while self._waiting and self._waiting[0].arrived():
            self._write(self._waiting.popleft())

    def _write(self, snapshot: Snapshot) -> None:
        record = snapshot.record()
        self.history.append(record)
        for sink in list(self._sinks):
            try:
                sink.write(record)
            except OSError as error:
                self._sinks.remove(sink)
                with suppress(OSError):
                    sink.close()
                warnings.warn(f"the monitor writes no more to {sink}: {error}", stacklevel=outside())


class _Hook:
    """A hook that a copy of the optimizer has no use for: deepcopy and pickle make one that does nothing, for
    optimizers that take their hooks along."""

    def __init__(self, function: Callable[[Any], None] | None = None) -> None:
        self.function = function

    @_disable_dynamo  # what it does is of no use in a graph
    def __call__(self, optimizer: Any, *_: object) -> None:
        if self.function is not None:
            self.function(optimizer)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _steps_made(optimizer: Any) -> int:
    """As far as its state tells: by the count of a base that has one, and by the looks of trackers, which begin anew
    where these do."""
    made = [0]
    for group in optimizer.param_groups:
        period = optimizer.rule.period(group) if isinstance(optimizer, SpectralOptimizer) else 1
        for param in group["params"]:
            state = optimizer.state.get(param)
            if isinstance(state, dict):
                made.append(int(state.get(STEP, 0)) * period - wait_of(state, period))
                count = state.get("step")
                if isinstance(count, int | float | Tensor):
                    made.append(int(count))
    return max(made)


def _check_kind(optimizer: Optimizer) -> SpectralOptimizer:
    if not isinstance(optimizer, SpectralOptimizer):
        raise TypeError(f"optimizer must be one of specopt, or wrapped by specopt.wrap, got {type(optimizer).__name__}")
    return optimizer


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 up, got {value!r}")
