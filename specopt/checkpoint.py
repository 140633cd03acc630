"""Loading a state: what it has to look like, looked at before any of it is taken up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from specopt.kernels import accumulation_dtype

from .base_step import own_entries
from .operators import Geometry
from .rules.operator import INITIAL, OPERATOR, block_shape, check_kernels, geometries_in
from .settling import settle
from .sharding.cut import is_distributed
from .tracker.common import BLOCK, LEFT, PROBE, RIGHT, STATS, STEP, WAIT, Stat
from .views import Matrix, is_controlled, matrices_of
from .views.parts import readings

if TYPE_CHECKING:
    from .control import SpectralOptimizer

FOLLOWED = (BLOCK, PROBE, LEFT, RIGHT, OPERATOR)
"""What a tracker follows singular vectors by, and never gets rid of a NaN in."""
ANY = -1
"""In a shape: a length that options decide."""


@contextmanager
def guarded(optimizer: SpectralOptimizer) -> Iterator[None]:
    """While the base loads a state: refuses one that cannot be meant, gives what a rule stored its precision back, and
    takes everything back where loading fails.

    Raises:
        ValueError: state of a weight of another shape, or an option that makes no sense.
    """
    loaded: list[dict[str, Any]] = []
    options = [{name: group[name] for name in optimizer.rule.names} for group in optimizer.param_groups]

    def see(_: Optimizer, seen: dict[str, Any]) -> None:
        _check_saved(optimizer, seen, options)
        loaded.append(seen)  # after all hooks of the user that may have replaced it

    def restore(_: Optimizer) -> None:
        _restore(optimizer, loaded[-1], options)

    hooks = [
        optimizer.register_load_state_dict_pre_hook(see),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    before = optimizer.state, optimizer.param_groups
    try:
        yield
    except Exception:
        optimizer.state, optimizer.param_groups = before
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _restore(optimizer: SpectralOptimizer, loaded: dict[str, Any], options: Sequence[dict[str, Any]]) -> None:
    """Options that were not saved, as they were; and the dtype of what the base has cast to the parameter's."""
    for group, mine, saved in zip(optimizer.param_groups, options, loaded["param_groups"], strict=True):
        group.update({name: value for name, value in mine.items() if name not in saved}, **_of_the_model(mine))
    keys = chain.from_iterable(group["params"] for group in loaded["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, param in zip(keys, params, strict=True):
        for name, value in own_entries(loaded["state"].get(key, {})).items():
            if name in FOLLOWED and isinstance(value, Tensor) and not is_distributed(value) and not _is_finite(value):
                del optimizer.state[param][name]  # the tracker starts anew where it finds none
            elif isinstance(value, Tensor):
                dtype = accumulation_dtype(param.dtype)
                optimizer.state[param][name] = value.to(param.device, dtype, copy=True)
    for group in optimizer.param_groups:
        _drop_other_sizes(optimizer, group)


def _of_the_model(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a group that has it does not take from a checkpoint: geometries describe the model that is to be trained."""
    return {"geometry": options["geometry"]} if options.get("geometry") is not None else {}


def _drop_other_sizes(optimizer: SpectralOptimizer, group: Mapping[str, Any]) -> None:
    """What was followed and noted of the maps that a group's kernels make of inputs of another size."""
    operators = geometries_in(group)
    for param in group["params"]:
        state = optimizer.state.get(param, {})
        if id(param) in operators and OPERATOR in state:
            rows, _ = block_shape(param, operators[id(param)])
            if not _has_shape(state[OPERATOR], (rows, ANY)):
                del state[OPERATOR]
                state.pop(INITIAL, None)


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _check_saved(optimizer: SpectralOptimizer, saved: dict[str, Any], options: Sequence[dict[str, Any]]) -> None:
    groups = saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        return  # the base has an error for that
    names = cache(optimizer.names)
    for mine, now, saved_group in zip(optimizer.param_groups, options, groups, strict=True):
        group = {**now, **saved_group, **_of_the_model(now)}
        _check_options(getattr(optimizer, "defaults", {}), group, type(optimizer).__name__)
        optimizer.rule.check(group)
        if "target" in optimizer.rule.names:
            settle({**group, "params": mine["params"]}, names)
        check_kernels({**group, "params": mine["params"]}, names)
        operators = geometries_in({**group, "params": mine["params"]})
        for param, key in zip(mine["params"], group["params"], strict=True):
            state = saved["state"].get(key, {})
            for kept in optimizer.like_weight:
                _check(param, state, kept, tuple(param.shape), names()[param])
            if id(param) in operators:
                _check_operator(param, state, operators[id(param)], names()[param])
            elif is_controlled(param, group):
                _check_matrices(matrices_of(param, group, state, optimizer.rule.columns(group)), state, names()[param])


def _check_options(defaults: Mapping[str, Any], group: Mapping[str, Any], optimizer: str) -> None:
    """Whether a group has what an optimizer of this kind always had.

    Switches came over the years, and an older state may lack them; numbers it may not.

    Raises:
        ValueError: it has not.
    """
    numbers = [name for name, value in defaults.items() if value is not None and not isinstance(value, bool | str)]
    missing = [name for name in numbers if name not in group]
    if missing:
        raise ValueError(
            f"a group to load has no {', '.join(missing)}, which {optimizer} takes: the state is that of another "
            "optimizer, and nothing was loaded"
        )


def _check_matrices(matrices: Sequence[Matrix], state: Mapping[str, Any], name: str) -> None:
    """Whether the tracker's state could be that of the weight of these matrices, under its view or another.

    How many columns a block has is not looked at: where the options ask for others, or for another reading, as after a
    change of ``block`` or ``view``, the tracker restarts in the next step that looks at the weight.

    Raises:
        ValueError: it could not, naming the parameter, its shape and what was found.
    """
    first = matrices[0]
    rows, columns = first.sizes[::-1] if first.flipped else first.sizes
    shapes = {STATS: (len(Stat),), LEFT: (rows, ANY), **dict.fromkeys((BLOCK, PROBE, RIGHT), (columns, ANY))}
    parts = () if first.part is None else (len(matrices),)
    for key, shape in shapes.items():
        if not _is_of_some_view(state.get(key), key, first.param):
            _check(first.param, state, key, (*parts, *shape), name + first.suffix)
    for key in (STEP, WAIT):
        count = state.get(key, 0)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(
                f"{key} of parameter {name + first.suffix} must be a count of steps, got {count!r}; nothing was loaded"
            )


def _check_operator(param: Tensor, state: Mapping[str, Any], geometry: Geometry, name: str) -> None:
    """Whether a block could be that of the kernel, on inputs of any size.

    Raises:
        ValueError: it could not, naming the parameter, its shape and what was found.
    """
    rows, _ = block_shape(param, geometry)
    block, channels = state.get(OPERATOR), rows // prod(geometry.size)
    if not isinstance(block, Tensor) or block.ndim != 2 or block.shape[0] % channels:
        _check(param, state, OPERATOR, (rows, ANY), name)


def _is_of_some_view(value: Any, key: str, param: Tensor) -> bool:
    """Whether a tracker of the weight, read in one way or another, could have left this. A matrix with few rows is read
    transposed, and one that is cut up by columns followed on its other side: so a block may have either length."""
    for count, *lengths in readings(tuple(param.shape)):
        shapes = [(len(Stat),)] if key == STATS else [(length, ANY) for length in lengths]
        if any(_has_shape(value, shape if count == 1 else (count, *shape)) for shape in shapes):
            return True
    return False


def _check(param: Tensor, state: Mapping[str, Any], key: str, shape: tuple[int, ...], name: str) -> None:
    value = state.get(key)
    if value is None or _has_shape(value, shape):
        return
    found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
    wanted = ", ".join("any" if length == ANY else str(length) for length in shape)
    raise ValueError(
        f"{key} of parameter {name}, whose shape is {tuple(param.shape)}, must have the shape ({wanted}), got {found}; "
        "the state is that of another parameter, and nothing was loaded"
    )


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(value, Tensor) or value.ndim != len(shape):
        return False
    return all(length in (ANY, found) for length, found in zip(shape, value.shape, strict=True))
