"""``param_groups(model)``: parameter groups by module type, with matrix views, and a table of what was decided."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .columns import in_columns
from .deciding import Decided, Overrides, decide
from .reading import Kind
from .recording import LayerShapes
from .targets import target_sigma
from .telling import listing, outside


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
        return in_columns(rows)

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
        inputs: what the model is called with, for ``target="size"`` and ``conv="operator"``: a dict is the keywords of
            the call, a tuple or list its arguments, all else the only one. One forward is made, see
            :func:`specopt.record_shapes`.
        shapes: what that function has returned, in place of ``inputs``.
        **group_options: of every group, such as ``lr``, ``weight_decay``, ``target`` or ``snr_lambda``. A target that
            is ``"size"`` or a callable, ``(MatrixInfo) -> float``, is settled here: groups hold the numbers, in a list
            beside their ``params``. So are the numbers that an override gives to each of a parameter's matrices. A
            target other than by name is left out of groups that are not controlled.

    Returns:
        A list of groups with named parameters, in torch's form. ``print`` shows what was decided, and why.

    Raises:
        TypeError: a model that is no Module; an override's key or options of another type.
        ValueError: a parameter not yet initialized; a view for all groups, or one that does not fit; a pattern that
            matches nothing; control asked for where a weight is computed from the parameter, or where nothing tells how
            to read it; an override with a target for what is not controlled; ``"size"`` of a layer of unknown sizes,
            or ``conv="operator"`` for a convolution of unknown input size.

    Example::

        overrides = {"*.qkv.weight": {"view": "rows:3"}, nn.Conv2d: {"target": "fan"}, "head": {"spectral": False}}
        groups = specopt.param_groups(model, lr=1e-3, overrides=overrides)
        print(groups)
        optimizer = specopt.NormScaleAdamW(groups)
    """
    groups: list[dict[str, Any]] = []
    doubtful: list[Decision] = []
    decided = decide(model, overrides, group_options, embeddings=embeddings, inputs=inputs, shapes=shapes)
    decisions = [_decision(one) for one in decided]
    for one, decision in zip(decided, decisions, strict=True):
        _put(groups, one)
        silenced = "spectral" in one.given or "view" in one.given or not group_options.get("spectral", True)
        if one.reading.kind in (Kind.COMPUTED_FROM, Kind.UNKNOWN) and not silenced:
            doubtful.append(decision)
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


# --- what was decided -------------------------------------------------------------------------------------------------


def _put(groups: list[dict[str, Any]], decided: Decided) -> None:
    options, beside = decided.options, decided.beside
    for group in groups:
        lists = [group.get(name) for name in beside]
        rest = {name: value for name, value in group.items() if name != "params" and name not in beside}
        if all(isinstance(entries, list) for entries in lists) and _same(options, rest):
            break
    else:
        group = {"params": [], **options, **{name: [] for name in beside}}
        groups.append(group)
    group["params"].append((decided.name, decided.places[0].param))
    for name, entry in beside.items():
        group[name].append(entry)


def _same(mine: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    if mine.keys() != others.keys():
        return False
    pairs = ((mine[name], others[name]) for name in mine)
    return all(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in pairs)


def _decision(decided: Decided) -> Decision:
    shape, matrices = tuple(decided.places[0].param.shape), decided.matrices
    tied = [owned.name for owned in decided.places[1:]]
    why = f"{decided.reading.why}, tied to {', '.join(tied)}" if tied else decided.reading.why
    shown = {key: decided.options[key] for key in decided.own if key in decided.options.keys() - {"spectral", "view"}}
    if matrices is None:
        return Decision(decided.name, shape, None, None, None, shown, why)
    target = {**decided.options, **decided.beside}.get("target", "channels")
    if isinstance(target, list):
        target = target[0] if len(set(target)) == 1 else tuple(target)
    elif target != "initial":
        target = target_sigma(matrices[1], target)
    return Decision(decided.name, shape, decided.options["view"], matrices, target, shown, why)


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
