"""What a step over shards may leave behind: sums that are due by the next one, or a step that was cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cut import local_of

if TYPE_CHECKING:
    from ..session import Ruled
    from .exchange import Due

AGAIN = (
    "Start the ranks again, with a new process group, model and optimizer, from a checkpoint; or load the weights and, "
    "with load_state_dict, the state of an earlier step"
)
CUT_OFF = (
    "the last step was cut off (a rank has died, or something else has failed between its sums over ranks): weights "
    f"and state are those of no step. {AGAIN}"
)
LATE_CUT_OFF = (
    "the late sum of the last step was cut off (a rank has died, or the sum has failed otherwise): the weights are "
    f"those of that step, but what the tracker keeps of them is incomplete. {AGAIN}"
)


def always() -> bool:
    return True


def never() -> bool:
    return False


class Unfinished:
    """Of the last step of an optimizer."""

    def __init__(self) -> None:
        self.due: Due | None = None
        """Sums on their way."""
        self.told = ""
        """Why nothing can be made of weights or state any more; empty while all is well."""

    @classmethod
    def of(cls, workspace: MutableMapping[Any, Any]) -> Unfinished:
        """That of the optimizer whose workspace it is."""
        found: Unfinished = workspace.setdefault("unfinished", cls())
        return found

    def check(self) -> None:
        """
        Raises:
            RuntimeError: the last step was cut off.
        """
        if self.told:
            raise RuntimeError(self.told)

    def take_up(self) -> None:
        """Waits for the sums that are due, and completes the state with them.

        Raises:
            RuntimeError: the last step was cut off; or the process group's own, where the sums fail.
        """
        self.check()
        due, self.due = self.due, None
        if due is not None:
            with self.watched(always, LATE_CUT_OFF):
                due.finish()

    @contextmanager
    def watched(self, has_written: Callable[[], bool], told: str = CUT_OFF) -> Iterator[None]:
        """An error in it is raised as ever, and told together with the reason from then on; but one that comes before
        anything was written leaves all as it was."""
        try:
            yield
        except BaseException as error:
            if has_written():
                self.told = f"{told}. (It failed with {type(error).__name__}: {error})"
            raise


def written_to(optimizer: Ruled) -> Callable[[], bool]:
    """Tells whether weights, or what their states hold now, have been written to since. State that is made anew is not
    counted: a base makes it where it looks for it."""
    values = _values(optimizer)  # held, so that no other object can take the id of one
    before = {place: _trace(value) for place, value in values.items()}

    def has_written() -> bool:
        after = {place: _trace(value) for place, value in _values(optimizer).items() if place in values}
        return after != before

    return has_written


def _values(optimizer: Ruled) -> dict[tuple[int, Any], Any]:
    """Parameters and entries of their states."""
    found = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            entries = {"": param, **state} if isinstance(state, dict) else {"": param}
            found.update({(id(param), key): value for key, value in entries.items()})
    return found


@torch.no_grad()
def _trace(value: Any) -> Any:
    """Of a tensor what every writing moves: a version, that of a DTensor or of what lies here of it."""
    if isinstance(value, Tensor):
        return id(value), value._version, local_of(value)._version
    return value if isinstance(value, int | float) else id(value)
