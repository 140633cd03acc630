"""Options of the rules, checked in the constructor: an error names the option, its value and what it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from specopt.kernels import MAX_COLUMNS

from .operators.geometry import parse as parse_geometry
from .targets import check_target, is_positive
from .views import SCALING, scaling
from .views.parts import parse


@dataclass(frozen=True, kw_only=True, repr=False)
class Shared:
    """The options that all rules have; :class:`specopt.SNRSGD` tells what they mean."""

    spectral: bool = True
    view: str = "auto"
    block: int = 32
    tolerance: float = 0.01
    max_passes: int | None = None
    stochastic_rounding: bool = False
    conv: str = "matrix"
    geometry: Sequence[str | None] | None = None

    def __post_init__(self) -> None:
        if self.geometry is not None:
            raise ValueError(
                "geometry must be a list in a group alone, beside its params, as specopt.param_groups makes it; a rule "
                f"got {self.geometry!r}"
            )
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))

    @property
    def options(self) -> dict[str, Any]:
        """What the groups of an optimizer hold of a rule, but for those that say otherwise."""
        return {field.metadata.get("option", field.name): getattr(self, field.name) for field in fields(self)}

    def __repr__(self) -> str:
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(told)})"


def plain(value: Any) -> Any:
    """Python's own int or float in the place of a number of another kind, such as NumPy's: what
    ``torch.load(weights_only=True)`` takes. All else as it is, and what no float can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    with suppress(OverflowError):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def named(option: str) -> dict[str, str]:
    """Metadata of a rule's field that goes by another name in a group."""
    return {"option": option}


SHARED = tuple(field.name for field in fields(Shared))
OF_RULES = ("snr_lambda", "decay_lambda", *SCALING)
"""What groups have of one rule and not of another."""
MAX_RANK = 16
"""Triplets that the tracker follows; more go by functions of all singular values at once."""
NORMS = ("spectral", "frobenius")
CONVS = ("matrix", "operator")
MODES = {"spectral": ("set", "cap", "rescale"), "frobenius": ("set", "cap")}


def check_shared(group: Mapping[str, Any]) -> None:
    if not isinstance(group["spectral"], bool):
        raise ValueError(f"spectral must be True or False, got {group['spectral']!r}")
    parse(group["view"])
    check_count("block", group["block"], MAX_COLUMNS)
    if not is_positive(group["tolerance"]):
        raise ValueError(f"tolerance must be a positive finite number, got {group['tolerance']!r}")
    if group["max_passes"] is not None:
        check_count("max_passes", group["max_passes"])
    if not isinstance(group["stochastic_rounding"], bool):
        raise ValueError(f"stochastic_rounding must be True or False, got {group['stochastic_rounding']!r}")
    check_conv(group)
    if group.get("differentiable"):
        raise ValueError(
            "differentiable must be False, got True: spectral control is not differentiated through; "
            "use the base optimizer with a penalty in the loss instead"
        )


def check_conv(group: Mapping[str, Any]) -> None:
    check_choice("conv", group["conv"], CONVS)
    given = group["geometry"]
    if given is None:
        return
    if not isinstance(given, list | tuple):
        raise ValueError(f"geometry must be a list beside params, of texts or None, got {given!r}")
    for text in given:
        if text is not None:
            parse_geometry(text)
    if group["conv"] == "operator" and any(text is not None for text in given) and scaling(group, "mode", None):
        _check_scaled_operator(group)


def _check_scaled_operator(group: Mapping[str, Any]) -> None:
    if group["norm"] != "spectral":
        raise ValueError(f"norm must be 'spectral' with conv='operator', got {group['norm']!r}")
    if group["mode"] == "set":
        raise ValueError(
            "mode must be 'rescale' or 'cap' with conv='operator', got 'set': a convolution with one singular triplet "
            "corrected is none any more; 'rescale' brings the operator norm to its target"
        )
    if group["rank"] != 1:
        raise ValueError(f"rank must be 1 with conv='operator', got {group['rank']!r}: the kernel is scaled as a whole")


def check_lambda(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_norm_scale(group: Mapping[str, Any]) -> None:
    check_choice("norm", group["norm"], NORMS)
    check_choice(f"mode (with norm={group['norm']!r})", group["mode"], MODES[group["norm"]])
    _check_rank(group)
    check_target(group["target"])
    if not isinstance(group["raise_small"], bool):
        raise ValueError(f"raise_small must be True or False, got {group['raise_small']!r}")


def _check_rank(group: Mapping[str, Any]) -> None:
    norm, mode, rank = group["norm"], group["mode"], group["rank"]
    if rank == "full":
        if (norm, mode) != ("spectral", "cap"):
            raise ValueError(f"rank='full' needs norm='spectral' and mode='cap', got norm={norm!r} and mode={mode!r}")
    elif not isinstance(rank, Integral) or isinstance(rank, bool) or not 1 <= int(rank) <= MAX_RANK:
        raise ValueError(
            f"rank must be an integer from 1 to {MAX_RANK}, the most triplets that the tracker follows, or 'full' for "
            f"a cap of all singular values, got {rank!r}"
        )
    elif int(rank) > 1 and (norm == "frobenius" or mode == "rescale"):
        raise ValueError(f"rank must be 1 with norm={norm!r} and mode={mode!r}, got {rank!r}: it changes all as one")
    check_count("every", group["every"])
    if group["every"] > 1 and group.get("capturable"):
        raise ValueError(
            f"every must be 1 with capturable=True, got {group['every']!r}: a graph that is replayed makes the same "
            "step each time"
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: Any, most: int | None = None) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= int(value) <= (most or int(value)):
        raise ValueError(f"{name} must be an integer from 1{f' to {most}' if most else ' up'}, got {value!r}")
