"""``param_groups(model)``: parameter groups by module type, with matrix views, and a table of what was decided."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .operators.groups import InputShape, add_geometries
from .reading import Kind, Owned, Reading, readings_of
from .targets import target_sigma
from .telling import listing, outside
from .views import could_be_controlled, is_controlled
from .views.parts import parse, pieces

Overrides = Mapping[Any, Mapping[str, Any]]


@dataclass(frozen=True)
class Decision:
    """What was decided for a parameter."""

    name: str
    shape: tuple[int, ...]
    view: str | None
    """None: not controlled."""
    matrices: tuple[int, tuple[int, ...]] | None
    """How many, and the ``(out, in, *kernel)`` of each."""
    target: str | float | None
    """σ* of each under Norm Scaling, as far as the options given here tell it."""
    options: Mapping[str, Any]
    """Those of its group that are not of all groups."""
    why: str


class ParamGroups(list[dict[str, Any]]):
    """Groups for an optimizer, and :attr:`decisions`, which ``print`` shows as a table. Holds no parameter but in its
    groups."""

    def __init__(self, groups: Iterable[dict[str, Any]], decisions: Iterable[Decision]) -> None:
        super().__init__(groups)
        self.decisions = tuple(decisions)

    def table(self) -> str:
        """A line for each parameter: name, shape, matrices, view, target, and why."""
        rows = [("name", "shape", "matrices", "view", "target", "why"), *map(_row, self.decisions)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def __str__(self) -> str:
        return self.table()


def param_groups(
    model: nn.Module,
    *,
    overrides: Overrides | None = None,
    embeddings: bool = False,
    shapes: Mapping[str, InputShape] | None = None,
    **group_options: Any,
) -> ParamGroups:
    """Groups for any optimizer of this package, from the types of a model's modules.

    ============================================  ====================================================================
    controlled                                    read as
    ============================================  ====================================================================
    Linear                                        ``(out, in)``
    Conv1d, Conv2d, Conv3d                        ``(out, in·k·k)``; grouped and depthwise: one matrix per group
    ConvTranspose1d, 2d, 3d                       ``(out, in·k·k)``, output channels as rows; per group
    MultiheadAttention                            query, key and value, a matrix each; the output projection a Linear
    RNN, LSTM, GRU and their cells                one matrix per gate, of the input's and of the hidden state's weight
    Bilinear                                      ``(out, in1·in2)``, the map of ``x1 ⊗ x2``, all of it input channels
    transformers' Conv1D                          ``(out, in)``, of a weight stored ``(in, out)``
    Embedding, EmbeddingBag                       with ``embeddings=True``, as stored ``(entries, width)``
    ============================================  ====================================================================

    Vectors, biases and norm layers are not controlled and get ``weight_decay=0``. Everything else has the decay of its
    group. Not controlled, and named in a warning:

    - what a weight is computed from (``torch.nn.utils.parametrizations``, and the older ``weight_norm``,
      ``spectral_norm`` and ``prune``): its norm is not the weight's, and may be controlled there already;
    - bare parameters of two dimensions or more in modules of other types, LoRA's A and B among them where they are
      such, and tied weights that are read in two ways.

    An adapter that holds A and B as two small Linears, as peft's do, is two matrices, each controlled as a Linear: with
    the default targets the norm of their product is at most ``sqrt(out/in)``, and B, zero at the start, is only capped
    until it has grown by itself.

    A tied weight comes once, under its first name; one that an Embedding shares is an Embedding's. A projection that is
    packed in a Linear, or in transformers' Conv1D, is one matrix unless an override says ``"rows:3"`` or
    ``"columns:3"``. A transposed conv in contiguous memory is read through a copy of its weight, in channels-last
    memory without one.

    Args:
        model: with its parameters in place; a lazy module has to have seen an input.
        overrides: options by module type (every parameter inside such a module), by pattern of ``fnmatch`` (the name
            of a parameter, or of a module around it) or by predicate ``(name, module, param) -> bool`` with the module
            that owns the parameter. Later ones win. ``{"spectral": False}`` turns control off, ``{"view": ...}`` on,
            also for what is not known by itself; ``lr``, ``target`` and all other options of a group go as well.
        embeddings: control embeddings too.
        shapes: by name of a weight, what its layer takes, ``.input`` being ``(channels, *size)``: for the convolutions
            of groups with ``conv="operator"``, see :mod:`specopt.operators`.
        **group_options: of every group, such as ``lr``, ``weight_decay``, ``target`` or ``snr_lambda``.

    Returns:
        A list of groups with named parameters, in torch's form. ``print`` shows what was decided, and why.

    Raises:
        TypeError: a model that is no Module; an override's key or options of another type.
        ValueError: a parameter not yet initialized; a view for all groups, or one that does not fit; a pattern that
            matches nothing; control asked for where a weight is computed from the parameter, or where nothing tells how
            to read it; ``conv="operator"`` for a convolution of unknown input size.

    Example::

        overrides = {"*.qkv.weight": {"view": "rows:3"}, nn.Conv2d: {"target": "fan"}, "head": {"spectral": False}}
        groups = specopt.param_groups(model, lr=1e-3, overrides=overrides)
        print(groups)
        optimizer = specopt.NormScaleAdamW(groups)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    overrides = _checked(overrides or {})
    groups: list[dict[str, Any]] = []
    decisions: list[Decision] = []
    doubtful: list[Decision] = []
    readings = readings_of(model)
    if "view" in group_options:
        raise ValueError(f"view must be given in overrides, by module, got {group_options['view']!r} for all")
    _check_patterns(overrides, [owned for places, _ in readings for owned in places])
    for places, reading in readings:
        given = _given(overrides, places)
        own = _own_options(places[0], reading, given, embeddings)
        _put(groups, places[0], {**group_options, **own})
        decisions.append(_decision(places, reading, {**group_options, **own}, own))
        silenced = "spectral" in given or "view" in given or not group_options.get("spectral", True)
        if reading.kind in (Kind.COMPUTED_FROM, Kind.UNKNOWN) and not silenced:
            doubtful.append(decisions[-1])
    _warn(doubtful)
    add_geometries(groups, {places[0].name: places[0].module for places, _ in readings}, shapes)
    return ParamGroups(groups, decisions)


def resolve(params: Any, beside: Iterable[Mapping[str, Any]] = ()) -> Any:
    """What a ``torch.optim`` constructor takes, from what one of ours does: a Module, alone or as the ``"params"`` of a
    group, stands for its :func:`param_groups` (with the other entries of that group as options). All else is returned
    as it is.

    torch takes names in all groups or in none: a Module beside groups without names, here or in ``beside``, which the
    optimizer has already, gives up its own.
    """
    if isinstance(params, nn.Module):
        return param_groups(params)
    if isinstance(params, ParamGroups):  # an optimizer writes into its groups: these may be given to another as well
        return [{**group, "params": list(group["params"])} for group in params]
    if isinstance(params, list | tuple) and any(map(_holds_module, params)):
        entries = [entry if _holds_module(entry) else _listed(entry) for entry in params]
        others = [*beside, *(entry for entry in entries if not _holds_module(entry))]
        expand = _named if all(map(_has_names, others)) else _nameless
        return [group for entry in entries for group in (expand(entry) if _holds_module(entry) else [entry])]
    return params


def _holds_module(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("params"), nn.Module)


def _listed(entry: Any) -> Any:
    """The same group, to be looked at more than once."""
    if isinstance(entry, dict) and isinstance(entry.get("params"), Iterator):
        return {**entry, "params": list(entry["params"])}
    return entry


def _has_names(group: Any) -> bool:
    if not isinstance(group, Mapping) or "param_names" in group:
        return isinstance(group, Mapping)
    params = group.get("params")
    return isinstance(params, Sequence) and len(params) > 0 and isinstance(params[0], tuple)


def _named(entry: Any) -> list[dict[str, Any]]:
    return param_groups(entry["params"], **{name: value for name, value in entry.items() if name != "params"})


def _nameless(entry: Any) -> list[dict[str, Any]]:
    return [{**group, "params": [param for _, param in group["params"]]} for group in _named(entry)]


# --- overrides ------------------------------------------------------------------------------------------------------


def _checked(overrides: Overrides) -> Overrides:
    for key, options in overrides.items():
        if not (isinstance(key, str) or _is_type(key) or callable(key)):
            raise TypeError(f"a key of overrides must be a module type, a pattern or a predicate, got {key!r}")
        if not isinstance(options, Mapping):
            raise TypeError(f"overrides[{key!r}] must be a dict of group options, got {options!r}")
    return overrides


def _is_type(key: Any) -> bool:
    types = key if isinstance(key, tuple) else (key,)
    return bool(types) and all(isinstance(kind, type) for kind in types)


def _check_patterns(overrides: Overrides, everywhere: Sequence[Owned]) -> None:
    for key in overrides:
        if isinstance(key, str) and not any(_matches(key, owned) for owned in everywhere):
            raise ValueError(f"the pattern {key!r} of overrides matches no parameter and no module of the model")


def _matches(key: Any, owned: Owned) -> bool:
    if isinstance(key, str):
        return any(fnmatchcase(name, key) for name in (owned.name, *(name for name, _ in owned.path[1:])))
    if _is_type(key):
        return any(isinstance(module, key) for _, module in owned.path)
    return bool(key(owned.name, owned.module, owned.param))


def _given(overrides: Overrides, places: Sequence[Owned]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for key, options in overrides.items():
        if any(_matches(key, owned) for owned in places):
            given.update(options)
    return given


# --- decisions ------------------------------------------------------------------------------------------------------


def _own_options(owned: Owned, reading: Reading, given: Mapping[str, Any], embeddings: bool) -> dict[str, Any]:
    """The options that a parameter's group has beside those of all groups."""
    decay = {"weight_decay": 0.0} if reading.kind is Kind.VECTOR else {}
    rest = {name: value for name, value in given.items() if name not in ("spectral", "view")}
    view = given.get("view", reading.view)
    wanted = reading.kind is Kind.MATRIX or (reading.kind is Kind.EMBEDDING and embeddings) or "view" in given
    never = not could_be_controlled(owned.param) or (reading.kind is Kind.VECTOR and view is None)
    if never or not given.get("spectral", wanted):
        return {"spectral": False, **decay, **rest}
    if reading.kind is Kind.COMPUTED_FROM:
        raise ValueError(f"{owned.name} cannot be controlled: {reading.why}; leave it out of overrides that ask for it")
    if view is None:
        raise ValueError(f"overrides ask for control of {owned.name}, but {reading.why}: give a view as well")
    asked = {"spectral": True} if "spectral" in given or "view" in given else {}
    return {"view": view, **asked, **decay, **rest}


def _put(groups: list[dict[str, Any]], owned: Owned, options: dict[str, Any]) -> None:
    for group in groups:
        if _same(options, {name: value for name, value in group.items() if name != "params"}):
            group["params"].append((owned.name, owned.param))
            return
    groups.append({"params": [(owned.name, owned.param)], **options})


def _same(mine: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    if mine.keys() != others.keys():
        return False
    pairs = ((mine[name], others[name]) for name in mine)
    return all(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in pairs)


def _decision(
    places: Sequence[Owned], reading: Reading, options: Mapping[str, Any], own: Mapping[str, Any]
) -> Decision:
    name, param = places[0].name, places[0].param
    tied = [owned.name for owned in places[1:]]
    why = f"{reading.why}, tied to {', '.join(tied)}" if tied else reading.why
    shown = {key: value for key, value in own.items() if key not in ("spectral", "view")}
    if not is_controlled(param, {"spectral": True, "view": "auto", **options}):
        return Decision(name, tuple(param.shape), None, None, None, shown, why)
    try:
        found = pieces(param.detach(), parse(options["view"]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    target = options.get("target", "channels")
    sigma = target_sigma(found[0], target) if target != "initial" else target
    return Decision(name, tuple(param.shape), options["view"], (len(found), tuple(found[0].shape)), sigma, shown, why)


def _row(decision: Decision) -> tuple[str, ...]:
    matrices, target = "-", "-"
    if decision.matrices is not None:
        count, shape = decision.matrices
        matrices = f"{count} x {shape}" if count > 1 else str(shape)
        target = decision.target if isinstance(decision.target, str) else f"{decision.target:.4g}"
    options = ", ".join(f"{key}={value!r}" for key, value in decision.options.items())
    why = f"{decision.why}; {options}" if options else decision.why
    return decision.name, str(decision.shape), matrices, decision.view or "-", target, why


def _warn(doubtful: Sequence[Decision]) -> None:
    if not doubtful:
        return
    listed = listing([f"{d.name} {d.shape}: {d.why}" for d in doubtful], "; ")
    warnings.warn(
        f"{len(doubtful)} parameter(s) of two dimensions or more are not controlled ({listed}). Give "
        "overrides={name: {'view': ...}} to control what is a matrix, or {'spectral': False} to leave it without this "
        "warning.",
        stacklevel=outside(),
    )
