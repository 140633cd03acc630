"""``param_groups(model)``: parameter groups by module type, with matrix views, and a table of what was decided."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .reading import Kind, Owned, Reading, readings_of
from .recording import LayerShapes, record_call
from .settling import entry_of, is_settled
from .targets import check_target, is_individual, target_sigma
from .telling import listing, outside
from .views import could_be_controlled, is_controlled
from .views.parts import parse, piece_shape

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
    target: str | float | tuple[float, ...] | None
    """σ* of each under Norm Scaling, as far as the options given here tell it; all of them where they differ."""
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
    inputs: Any = None,
    shapes: Mapping[str, LayerShapes] | None = None,
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
        inputs: what the model is called with, for ``target="size"``: a dict is the keywords of the call, a tuple or
            list its arguments, all else the only one. One forward is made, see :func:`specopt.record_shapes`.
        shapes: what that function has returned, in place of ``inputs``.
        **group_options: of every group, such as ``lr``, ``weight_decay``, ``target`` or ``snr_lambda``. A target that
            is ``"size"`` or a callable, ``(MatrixInfo) -> float``, is settled here: groups hold the numbers, in a list
            beside their ``params``. So are the numbers that an override gives to each of a parameter's matrices. What
            is not controlled has no target.

    Returns:
        A list of groups with named parameters, in torch's form. ``print`` shows what was decided, and why.

    Raises:
        TypeError: a model that is no Module; an override's key or options of another type.
        ValueError: a parameter not yet initialized; a view for all groups, or one that does not fit; a pattern that
            matches nothing; control asked for where a weight is computed from the parameter, or where nothing tells how
            to read it; an override with a target for what is not controlled; ``"size"`` of a layer of unknown sizes.

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
    _check_common(group_options)
    _check_patterns(overrides, [owned for places, _ in readings for owned in places])
    sizes = _sizes(model, inputs, shapes)
    for places, reading in readings:
        given = _given(overrides, places)
        own = _own_options(places[0], reading, given, embeddings)
        matrices = _matrices(places[0], {**group_options, **own})
        options, beside = _settled(places[0], {**group_options, **own}, matrices, sizes)
        _put(groups, places[0], options, beside)
        decisions.append(_decision(places, reading, matrices, {**options, **beside}, own))
        silenced = "spectral" in given or "view" in given or not group_options.get("spectral", True)
        if reading.kind in (Kind.COMPUTED_FROM, Kind.UNKNOWN) and not silenced:
            doubtful.append(decisions[-1])
    _check_reached(overrides, readings, {decision.name for decision in decisions if decision.matrices})
    _warn(doubtful)
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
        if options.get("spectral") is False and is_individual(options.get("target")):
            raise ValueError(
                f"overrides[{key!r}] must not give a target to what it turns off, got target={options['target']!r} and "
                "spectral=False: leave one of them out"
            )
    return overrides


def _is_type(key: Any) -> bool:
    types = key if isinstance(key, tuple) else (key,)
    return bool(types) and all(isinstance(kind, type) for kind in types)


def _check_patterns(overrides: Overrides, everywhere: Sequence[Owned]) -> None:
    for key in overrides:
        if isinstance(key, str) and not any(_matches(key, owned) for owned in everywhere):
            raise ValueError(f"the pattern {key!r} of overrides matches no parameter and no module of the model")


def _check_common(options: Mapping[str, Any]) -> None:
    """The options of all groups."""
    if "view" in options:
        raise ValueError(f"view must be given in overrides, by module, got {options['view']!r} for all")
    if isinstance(options.get("target"), list | tuple):
        raise ValueError(f"target must be one for all groups, or given in overrides, got {options['target']!r} for all")


def _check_reached(
    overrides: Overrides, readings: Sequence[tuple[Sequence[Owned], Reading]], controlled: Collection[str]
) -> None:
    """Whoever gives a number to a layer means that layer: it is an error where none of those that match is on."""
    for key, options in overrides.items():
        if is_individual(options.get("target")):
            names = [places[0].name for places, _ in readings if any(_matches(key, owned) for owned in places)]
            if names and not any(name in controlled for name in names):
                raise ValueError(
                    f"overrides[{key!r}] must not give a target to what is not controlled, got "
                    f"target={options['target']!r} for {listing(names)}: print(specopt.param_groups(model)) tells why"
                )


def _sizes(model: nn.Module, inputs: Any, shapes: Mapping[str, LayerShapes] | None) -> Mapping[str, LayerShapes] | None:
    if shapes is None:
        return None if inputs is None else record_call(model, inputs)
    if inputs is not None:
        raise ValueError("inputs must not be given beside shapes: they are what those are recorded from")
    if not isinstance(shapes, Mapping) or not all(isinstance(found, LayerShapes) for found in shapes.values()):
        raise TypeError(f"shapes must be what specopt.record_shapes returns, got {shapes!r}")
    return shapes


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


def _matrices(owned: Owned, options: Mapping[str, Any]) -> tuple[int, tuple[int, ...]] | None:
    """How many a parameter holds, and the shape of each; None where it is not controlled."""
    if not is_controlled(owned.param, {"spectral": True, "view": "auto", **options}):
        return None
    try:
        return piece_shape(tuple(owned.param.shape), parse(options["view"]))
    except ValueError as error:
        raise ValueError(f"{owned.name}: {error}") from None


def _settled(
    owned: Owned,
    options: dict[str, Any],
    matrices: tuple[int, tuple[int, ...]] | None,
    sizes: Mapping[str, LayerShapes] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a parameter's group, and what that has beside its ``params``, an entry for each."""
    if "target" not in options:
        return options, {}
    others = {name: value for name, value in options.items() if name != "target"}
    if matrices is None:
        return others, {}
    target = options["target"]
    check_target(target)
    if is_settled(target):
        return options, {}
    return others, {"target": entry_of(target, owned.name, owned.param, options["view"], sizes)}


def _put(groups: list[dict[str, Any]], owned: Owned, options: dict[str, Any], beside: dict[str, Any]) -> None:
    for group in groups:
        lists = [group.get(name) for name in beside]
        rest = {name: value for name, value in group.items() if name != "params" and name not in beside}
        if all(isinstance(entries, list) for entries in lists) and _same(options, rest):
            break
    else:
        group = {"params": [], **options, **{name: [] for name in beside}}
        groups.append(group)
    group["params"].append((owned.name, owned.param))
    for name, entry in beside.items():
        group[name].append(entry)


def _same(mine: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    if mine.keys() != others.keys():
        return False
    pairs = ((mine[name], others[name]) for name in mine)
    return all(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in pairs)


def _decision(
    places: Sequence[Owned],
    reading: Reading,
    matrices: tuple[int, tuple[int, ...]] | None,
    options: Mapping[str, Any],
    own: Mapping[str, Any],
) -> Decision:
    name, param = places[0].name, places[0].param
    tied = [owned.name for owned in places[1:]]
    why = f"{reading.why}, tied to {', '.join(tied)}" if tied else reading.why
    shown = {key: value for key, value in own.items() if key not in ("spectral", "view")}
    if matrices is None:
        return Decision(name, tuple(param.shape), None, None, None, shown, why)
    target = options.get("target", "channels")
    if isinstance(target, list):
        target = target[0] if len(set(target)) == 1 else tuple(target)
    elif target != "initial":
        target = target_sigma(matrices[1], target)
    return Decision(name, tuple(param.shape), options["view"], matrices, target, shown, why)


def _row(decision: Decision) -> tuple[str, ...]:
    matrices, target = "-", "-"
    if decision.matrices is not None:
        count, shape = decision.matrices
        matrices = f"{count} x {shape}" if count > 1 else str(shape)
        sigmas = decision.target if isinstance(decision.target, tuple) else (decision.target,)
        target = ", ".join(sigma if isinstance(sigma, str) else f"{sigma:.4g}" for sigma in sigmas)
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
