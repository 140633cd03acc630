"""Lipschitz constants of what combines, scales and picks tensors, from the constants of its arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import functions
from .gram import in_double, largest_norm, root, times, total, up
from .known import Call, NotKnown
from .layers import Norms
from .modules import gain_of
from .values import DTYPE, Value, map_aggregate, values_in


def of_function(
    norms: Norms, key: Any, args: Any, kwargs: Any, constants: list[float], given: Any, result: Any
) -> float:
    """The constant of a function's result.

    Args:
        key: the function, or the name of the method.
        args, kwargs: its arguments, with a :class:`Value` for each that depends on the inputs.
        constants: of these.
        given, result: an example of the first of them, and of the result.

    Raises:
        NotKnown: where there is none, or we know of none.
    """
    if kwargs.get("out") is not None:
        raise NotKnown("writes into out=")
    _stays_real(key, args, kwargs, given, result)
    if key in functions.AS_MODULE:
        only_first(args, kwargs)
        try:
            module = functions.AS_MODULE[key](*args[1:], **kwargs)
        except (TypeError, ValueError, KeyError) as error:
            raise NotKnown(f"is called in a way that is not known: {error}") from None
        return times(gain_of(module, Call(norms, module.training, given, result)), *constants)
    if key in functions.REARRANGED:
        only_first(args, kwargs, but_sizes=True)
        return constants[0]
    if key in functions.CLAMPED:
        only_first(args, kwargs)
        return times(_expansion(args[0], result, [*args[1:], *kwargs.values()]), constants[0])
    if key is getattr and args[1] in functions.TRANSPOSES:
        return constants[0]
    if key is operator.getitem:
        only_first(args, kwargs, but_sizes=True)
        return times(_of_index(args), constants[0])
    if key in functions.SUMS or key in functions.DIFFERENCES:
        return _of_sum(args, kwargs, result)
    if key in functions.PRODUCTS or key in functions.QUOTIENTS:
        return _of_product(args, kwargs, result, divides=key in functions.QUOTIENTS)
    if key in functions.JOINED:
        joint = joint_constant(constants)
        assert joint is not None
        return joint
    if key in functions.MEANS:
        only_first(args, kwargs, but_sizes=True)
        return times(_of_mean(key, given, result), constants[0])
    if key in functions.EXPANDED:
        only_first(args, kwargs, but_sizes=True)
        return times(_expansion(args[0], result), constants[0])
    if key in functions.MATRIX_PRODUCTS:
        return times(_of_matrix(args, kwargs, norms.tolerance), constants[0])  # the only one
    raise NotKnown("is no function whose Lipschitz constant is known")


def joint_constant(constants: Sequence[float | None]) -> float | None:
    """``√(Σ c²)``: of several values side by side."""
    known = [constant for constant in constants if constant is not None]
    if len(known) != len(constants):
        return None
    return known[0] if len(known) == 1 else up(math.hypot(*known))


def _of_sum(args: Any, kwargs: Any, result: Any) -> float:
    scale = kwargs.get("alpha", 1)
    if isinstance(scale, Value) or len(args) != 2:
        raise NotKnown("is called in a way that is not known")
    terms = []
    for term, factor in zip(args, (1.0, abs(float(scale))), strict=True):
        if isinstance(term, Value) and term.constant:
            others = [other for other in args if other is not term]
            terms.append(times(term.constant, _expansion(term, result, others), factor))
    return total(terms)


def _of_product(args: Any, kwargs: Any, result: Any, divides: bool) -> float:
    if kwargs or len(args) != 2:
        raise NotKnown("is called in a way that is not known")
    varying = [i for i, factor in enumerate(args) if isinstance(factor, Value)]
    if any(isinstance(factor, Value) and factor.constant == 0 for factor in args):
        raise NotKnown("multiplies, or divides by, what is not known without inputs; give inputs=")
    if len(varying) != 1 or (divides and varying != [0]):
        raise NotKnown("multiplies, or divides by, what depends on the inputs: it grows with them")
    value, other = args[varying[0]], args[1 - varying[0]]
    if not isinstance(other, int | float | Tensor) or (isinstance(other, Tensor) and other.is_complex()):
        raise NotKnown(f"multiplies by a {type(other).__name__}")
    sizes = in_double(torch.as_tensor(other, dtype=None if isinstance(other, Tensor) else torch.float64)).abs()
    largest = float((1 / sizes if divides else sizes).max()) if sizes.numel() else 0.0
    if largest != largest:
        largest = math.inf
    return times(value.constant or 0.0, up(largest) if divides else largest, _expansion(value, result, [other]))


def _expansion(value: Value, result: Any, others: Sequence[Any] | None = None) -> float:
    """``√(how often broadcasting shows an entry)``."""
    if isinstance(result, Tensor) and isinstance(value.example, Tensor):
        small = max(value.example.numel(), 1)
        return root(-(-result.numel() // small))
    single = [not isinstance(o, Value) and (not isinstance(o, Tensor) or o.ndim == 0) for o in others or ()]
    if others is not None and all(single):
        return 1.0
    raise NotKnown("may broadcast its arguments, whose shapes are not known; give inputs=")


def _of_mean(key: Any, given: Any, result: Any) -> float:
    """Of n entries each: ``√n`` for a sum, ``1/√n`` for a mean."""
    is_sum = key in (torch.sum, "sum")
    if not isinstance(given, Tensor) or not isinstance(result, Tensor):
        if is_sum:
            raise NotKnown("adds up sizes that are not known; give inputs=")
        return 1.0
    number = -(-given.numel() // max(result.numel(), 1))
    return root(number) if is_sum else (up(1 / math.sqrt(number)) if number > 1 else 1.0)


def _of_index(args: Any) -> float:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in index):
        return 1.0
    raise NotKnown("is indexed by a tensor or a list, which may take an entry several times")


def _of_matrix(args: Any, kwargs: Any, tolerance: float) -> float:
    """Products of an input and a constant matrix."""
    constants = [arg for arg in args[:2] if not isinstance(arg, Value)]
    if "weight" in kwargs:
        constants.append(kwargs["weight"])
    if values_in((args[2:], {name: value for name, value in kwargs.items() if name != "weight"})):
        raise NotKnown("has several arguments that depend on the inputs")
    if len(constants) != 1 or not isinstance(constants[0], Tensor) or constants[0].ndim != 2:
        raise NotKnown("multiplies what depends on the inputs by itself, or by a tensor that is no matrix")
    return largest_norm(in_double(constants[0]), tolerance)


def only_first(args: Any, kwargs: Any, *, but_sizes: bool = False) -> None:
    """
    Raises:
        NotKnown: where another argument than the first is a :class:`Value`; ``but_sizes``, one that is no constant.
    """
    others = [value for value in values_in((args[1:], kwargs)) if not but_sizes or value.constant != 0]
    if not args or not isinstance(args[0], Value) or others:
        raise NotKnown("has several arguments that depend on the inputs")


def _stays_real(key: Any, args: Any, kwargs: Any, given: Any, result: Any) -> None:
    """A rounding to integers is a jump, and so is another reading of the same bits.

    Raises:
        NotKnown: where the result has another dtype than floating point that the input has not, or may have one.
    """
    dtypes: list[torch.dtype] = []

    def note(leaf: Any) -> None:
        if leaf is DTYPE or (key in functions.CASTS and isinstance(leaf, Value) and leaf.example is None):
            raise NotKnown("takes a dtype that is not known; give inputs=")
        if isinstance(leaf, torch.dtype):
            dtypes.append(leaf)
        elif key in functions.CASTS and isinstance(leaf, Tensor):
            dtypes.append(leaf.dtype)
        elif key == "type" and result is None:
            dtypes.append(_dtype_of(leaf))

    map_aggregate((args[1:], kwargs), note)
    reads_bits = key == "view" and dtypes
    if isinstance(given, Tensor):
        map_aggregate(result, lambda leaf: dtypes.append(leaf.dtype) if _is_cast(leaf, given) else None)
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise NotKnown("makes integers of it")
    if reads_bits:
        raise NotKnown("reads its bits as another dtype")


def _is_cast(leaf: Any, given: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype != given.dtype


def _dtype_of(name: Any) -> torch.dtype:
    """Of ``"torch.LongTensor"`` and such."""
    try:
        found = operator.attrgetter(str(name).removeprefix("torch."))(torch).dtype
    except AttributeError:
        found = None
    if isinstance(found, torch.dtype):
        return found
    raise NotKnown(f"takes a type that is not known, {name!r}")
