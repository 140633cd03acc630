"""What is decided for each parameter of a model: from the type of its module, and from overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .operators.groups import geometry_text
from .options import CONVS, check_choice
from .reading import Kind, Owned, Reading, readings_of
from .recording import LayerShapes, record_call
from .settling import entry_of, is_settled
from .sharding.checking import flattened, is_flattened
from .targets import check_target, is_individual
from .telling import listing
from .views import could_be_controlled, is_controlled
from .views.parts import parse, piece_shape

Overrides = Mapping[Any, Mapping[str, Any]]


@dataclass(frozen=True)
class Decided:
    """A parameter, and how it is to be treated."""

    places: Sequence[Owned]
    """Where it stands; the first gives it its name."""
    reading: Reading
    given: Mapping[str, Any]
    """Options that overrides give to it."""
    own: Mapping[str, Any]
    """Options that its group has beside those of all groups."""
    options: Mapping[str, Any]
    """All options of its group."""
    beside: Mapping[str, Any]
    """Its entries in what its group has for each parameter, as ``params`` is."""
    matrices: tuple[int, tuple[int, ...]] | None
    """How many it holds, and the ``(out, in, *kernel)`` of each; None where it is not controlled."""

    @property
    def name(self) -> str:
        return self.places[0].name


def decide(
    model: nn.Module,
    overrides: Overrides | None,
    common: Mapping[str, Any],
    *,
    embeddings: bool = False,
    inputs: Any = None,
    shapes: Mapping[str, LayerShapes] | None = None,
) -> list[Decided]:
    """For every parameter of a model once; ``common`` are the options of all groups. For the others, and what is
    raised, see :func:`specopt.param_groups`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    overrides = _checked(overrides or {})
    readings = readings_of(model)
    _check_common(common)
    _check_patterns(overrides, [owned for places, _ in readings for owned in places])
    sizes = _sizes(model, inputs, shapes)
    decided = []
    for places, reading in readings:
        given = _given(overrides, places)
        if given.get("spectral", True) and is_flattened(places[0].param):
            raise flattened(places[0].param, places[0].name)
        own = _own_options(places[0], reading, given, embeddings)
        matrices = _matrices(places[0], {**common, **own})
        options, beside = _settled(places[0], {**common, **own}, matrices, sizes)
        if _is_operator(options):
            beside["geometry"] = geometry_text(places[0].name, [place.module for place in places], sizes)
        decided.append(Decided(places, reading, given, own, options, beside, matrices))
    _check_reached(overrides, decided)
    return decided


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
    if "conv" in options:
        check_choice("conv", options["conv"], CONVS)
    if isinstance(options.get("target"), list | tuple):
        raise ValueError(f"target must be one for all groups, or given in overrides, got {options['target']!r} for all")


def _check_reached(overrides: Overrides, decided: Sequence[Decided]) -> None:
    """Whoever gives a number to a layer means that layer: it is an error where none of those that match is on."""
    for key, options in overrides.items():
        if is_individual(options.get("target")):
            found = [one for one in decided if any(_matches(key, owned) for owned in one.places)]
            if found and all(one.matrices is None for one in found):
                raise ValueError(
                    f"overrides[{key!r}] must not give a target to what is not controlled, got "
                    f"target={options['target']!r} for {listing([one.name for one in found])}: "
                    "print(specopt.param_groups(model)) tells why"
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


def _is_operator(options: Mapping[str, Any]) -> bool:
    on = options.get("conv") == "operator" and options.get("spectral", True)
    return bool(on and "geometry" not in options)


def _settled(
    owned: Owned,
    options: dict[str, Any],
    matrices: tuple[int, tuple[int, ...]] | None,
    sizes: Mapping[str, LayerShapes] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a parameter's group, and what that has beside its ``params``, an entry for each."""
    if "target" not in options:
        return options, {}
    target = options["target"]
    check_target(target)
    others = {name: value for name, value in options.items() if name != "target"}
    if matrices is None:
        return others if is_individual(target) or target == "size" else options, {}
    if is_settled(target):
        return options, {}
    return others, {"target": entry_of(target, owned.name, owned.param, options["view"], sizes)}
