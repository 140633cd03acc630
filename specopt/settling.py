"""Targets settled: callables and layer sizes as the numbers that an optimizer's groups hold.

A group's ``target`` is then a list beside its ``params``, as ``param_names`` is: a float for a parameter, or a list of
floats for one that holds several matrices, and None where control is off. So groups are not split by target, and stay
what ``state_dict``, deepcopy and ``torch.load(weights_only=True)`` can carry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from .options import plain
from .recording import LayerShapes
from .targets import MatrixInfo, is_individual, is_positive, number, target_sigma
from .views import Matrix, is_controlled
from .views.parts import parse, piece_shape

HOW = 'specopt.param_groups(model, target="size", inputs=...), with what the model is called with,'
Names = Callable[[], Mapping[Tensor, str]]


def settle(group: dict[str, Any], names: Names) -> None:
    """Puts numbers in the place of a group's callable target, and looks at those of a list.

    Raises:
        ValueError: ``"size"``, of which a group knows nothing; a number that is none; a list of another length than
            ``params``, or in it one of another length than the parameter has matrices. Names the parameter. What a
            list says of parameters that are off is not looked at.
    """
    target, params = group["target"], group["params"]
    if isinstance(target, list | tuple):
        _check_list(group, names)
        if isinstance(target, list):
            target[:] = _plain(target)
    elif not is_settled(target):
        known = names()
        group["target"] = [
            entry_of(target, known[param], param, group["view"]) if is_controlled(param, group) else None
            for param in params
        ]


def adopt(group: dict[str, Any], names: Names) -> None:
    """:func:`settle` for a group that is new: its list of numbers is then its own, also where another optimizer, or
    whoever gave it, has the same one."""
    if isinstance(group["target"], list | tuple):
        group["target"] = _plain(group["target"])
    settle(group, names)


def is_settled(target: Any) -> bool:
    """Whether it is a name that shapes or weights explain, or a number: nothing that differs by parameter."""
    return not (callable(target) or isinstance(target, list | tuple) or target == "size")


def entry_of(
    target: Any, name: str, param: Tensor, view: str, sizes: Mapping[str, LayerShapes] | None = None
) -> float | list[float]:
    """The numbers of a parameter: what a callable says of each of its matrices, its layer's sizes, or those of a list.

    Raises:
        ValueError: what is no number, or too many or few; unknown sizes. Names the parameter.
    """
    count, shape = piece_shape(tuple(param.shape), parse(view))
    if isinstance(target, list | tuple):
        if wrong := _fault(target, count):
            raise ValueError(f"target of {name} {wrong}")
        return [float(value) for value in target]
    if target == "size":
        found = [target_sigma(shape, "size", _positions(name, shape, sizes))] * count
    else:
        parts = [None] if count == 1 else range(count)
        found = [_called(target, MatrixInfo(name, shape, part, tuple(param.shape))) for part in parts]
    return found[0] if count == 1 else found


def own_target(matrix: Matrix) -> str | float:
    """The target of a matrix of a group that is settled: a name or a number."""
    target: Any = matrix.group["target"]
    if isinstance(target, list | tuple):
        target = target[matrix.place]
    if isinstance(target, list | tuple):
        target = target[matrix.part or 0]
    if isinstance(target, str):
        return target
    if not is_positive(target):
        raise ValueError(f"target must be a name or a positive number by now, got {target!r}; step() looks at it first")
    return float(target)


def refuse_target_of_off(group: Mapping[str, Any], names: Collection[str]) -> None:
    """A target that a group gives itself is meant; with ``spectral=False`` beside it one of the two is a mistake.

    A group with all options of the rule (``names``) is that of another optimizer, which has filled it with what its
    other groups have.

    Raises:
        ValueError: both in a group.
    """
    is_filled = all(name in group for name in names)
    if group.get("spectral") is False and is_individual(group.get("target")) and not is_filled:
        raise ValueError(
            f"target must not be given to a group that is off, got target={group['target']!r} and spectral=False: "
            "leave one of them out"
        )


def _called(target: Callable[[MatrixInfo], Any], matrix: MatrixInfo) -> float:
    name = matrix.name if matrix.part is None else f"{matrix.name}[{matrix.part}]"
    try:
        value = target(matrix)
    except Exception as error:
        raise ValueError(f"target, a callable, fails for {name} of shape {matrix.shape}: {error!r}") from error
    return number(value, name)


def _positions(name: str, shape: tuple[int, ...], sizes: Mapping[str, LayerShapes] | None) -> float:
    if sizes is None:
        raise ValueError(f'target="size" of {name} needs the sizes of its layer: {HOW} finds them in one forward')
    if len(shape) == 2:  # a map of features has no positions
        return 1.0
    if name not in sizes:
        raise ValueError(
            f'target="size" of {name} needs the sizes of its layer, which the recorded forward did not call; give it a '
            "target of its own in overrides"
        )
    return sizes[name].positions


def _plain(entry: Any) -> Any:
    """Lists and floats, of whatever kinds of sequences and numbers there were: what a file can hold."""
    if isinstance(entry, list | tuple):
        return [_plain(value) for value in entry]
    return float(entry) if is_positive(entry) else plain(entry)


def _check_list(group: Mapping[str, Any], names: Names) -> None:
    target, params = group["target"], group["params"]
    if len(target) != len(params):
        last = names()[params[-1]] if params else "none"
        raise ValueError(
            f"target must have an entry for each parameter of its group, {len(params)} (the last is {last}), got "
            f"{len(target)}: {target!r}"
        )
    for entry, param in zip(target, params, strict=True):
        if is_positive(entry) or not is_controlled(param, group):
            continue
        if isinstance(entry, list | tuple):
            wrong = _fault(entry, piece_shape(tuple(param.shape), parse(group["view"]))[0])
        else:
            why = "; it was off when the targets of its group were settled" if entry is None else ""
            wrong = f"must be a positive finite number, got {entry!r}{why}"
        if wrong:
            raise ValueError(f"target of {names()[param]} {wrong}")


def _fault(entry: Sequence[float], count: int) -> str:
    """What is wrong with the numbers of a parameter that holds ``count`` matrices; nothing where it is empty."""
    if len(entry) != count:
        return f"must have a number for each of its {count} matrices, got {entry!r}"
    for value in entry:
        if not is_positive(value):
            return f"must hold positive finite numbers, got {value!r} in {entry!r}"
    return ""
