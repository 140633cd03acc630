"""How the parameters of torch's module types are read: from the type, never from its name or the parameter's shape."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList


class Kind(Enum):
    """What a parameter is."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    VECTOR = "vector"
    """A bias, a scale, a norm layer's weight: neither controlled nor decayed."""
    COMPUTED_FROM = "computed from"
    """Another tensor than the weight of the layer, which is computed from it."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Reading:
    """What a module does with a parameter of its own."""

    kind: Kind
    why: str
    view: str | None = None
    """See :mod:`specopt.views.parts`; None where nothing tells it."""


@dataclass(frozen=True)
class Owned:
    """A parameter where it stands in a model."""

    name: str
    param: nn.Parameter
    path: tuple[tuple[str, nn.Module], ...]
    """(name, module) from the model down to the module that owns the parameter."""

    @property
    def module(self) -> nn.Module:
        return self.path[-1][1]


GATES = {"LSTM": 4, "GRU": 3}  # RNNBase.mode
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)


def readings_of(model: nn.Module) -> list[tuple[list[Owned], Reading]]:
    """Every parameter once, in all of its places, with one reading of them.

    Raises:
        ValueError: a parameter not yet initialized.
    """
    places: dict[nn.Parameter, list[Owned]] = {}
    for owned in _owned_parameters(model):
        if is_lazy(owned.param):
            raise ValueError(
                f"{owned.name} is not initialized yet: run the model once before, so that its lazy modules take their "
                "shapes"
            )
        places.setdefault(owned.param, []).append(owned)
    return [(found, _together([_reading_of(owned) for owned in found])) for found in places.values()]


def _together(readings: list[Reading]) -> Reading:
    """One reading of a parameter that may be tied: that of the module that knows most of it."""
    for kind in (Kind.COMPUTED_FROM, Kind.EMBEDDING, Kind.MATRIX, Kind.UNKNOWN):
        found = [reading for reading in readings if reading.kind is kind]
        views = sorted({str(reading.view) for reading in found})
        if len(views) > 1:
            return Reading(Kind.UNKNOWN, f"tied, and read as {' and as '.join(views)}")
        if found:
            return found[0]
    return readings[0]


def _owned_parameters(model: nn.Module) -> Iterator[Owned]:
    """Every parameter in every place where a module has it: one that is tied, or in a shared module, comes several
    times."""

    def walk(path: tuple[tuple[str, nn.Module], ...]) -> Iterator[Owned]:
        prefix, module = path[-1]
        dotted = f"{prefix}." if prefix else ""
        for name, param in module._parameters.items():
            if param is not None:
                yield Owned(dotted + name, param, path)
        for name, child in module._modules.items():
            if child is not None and all(child is not above for _, above in path):
                yield from walk((*path, (dotted + name, child)))

    return walk((("", model),))


def _reading_of(owned: Owned) -> Reading:
    """What the module that owns a parameter does with it."""
    module, name = owned.module, owned.name.rpartition(".")[2]
    if isinstance(module, NORMS):
        return Reading(Kind.VECTOR, _type(module))
    if owned.param.ndim < 2:
        return Reading(Kind.VECTOR, "bias or scale")
    for _, above in owned.path:
        if isinstance(above, ParametrizationList):
            return Reading(Kind.COMPUTED_FROM, f"parametrized by {_kinds(above)}")
    for types, read in READERS:
        if isinstance(module, types):
            found = read(module, name)
            if found is not None:
                return found
    if is_transformers_conv1d(module) and name == "weight":
        return Reading(Kind.MATRIX, "Conv1D of transformers, stored (in, out)", "transposed")
    reparametrized = _of_another(module, name)
    if reparametrized:
        return Reading(Kind.COMPUTED_FROM, f"{reparametrized} is computed from it")
    return Reading(Kind.UNKNOWN, f"nothing is known of {name} in {type(module).__name__}")


def is_transformers_conv1d(module: nn.Module) -> bool:
    """GPT-2's layer, whose weight is ``(nx, nf)``, the transpose of a Linear's."""
    library = sys.modules.get("transformers.pytorch_utils")
    if library is not None and isinstance(module, getattr(library, "Conv1D", ())):
        return True
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    sizes = getattr(module, "nx", None), getattr(module, "nf", None)
    return weight is not None and weight.ndim == 2 and tuple(weight.shape) == sizes


# --- by module type: (module, name of the parameter) -> reading -----------------------------------------------------

Reader = Callable[..., Reading | None]


def _linear(module: nn.Module, name: str) -> Reading | None:
    return Reading(Kind.MATRIX, _type(module), "flatten") if name == "weight" else None


def _conv(module: _ConvNd, name: str) -> Reading | None:
    if name != "weight":
        return None
    grouped = f" of {module.groups} groups" if module.groups > 1 else ""
    if isinstance(module, _ConvTransposeNd):
        view = f"transposed:{module.groups}" if grouped else "transposed"
    else:
        view = f"rows:{module.groups}" if grouped else "flatten"
    return Reading(Kind.MATRIX, _type(module) + grouped, view)


def _attention(module: nn.MultiheadAttention, name: str) -> Reading | None:
    if name == "in_proj_weight":
        return Reading(Kind.MATRIX, "MultiheadAttention, query, key and value packed", "rows:3")
    if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return Reading(Kind.MATRIX, "MultiheadAttention", "flatten")
    return Reading(Kind.VECTOR, "bias of MultiheadAttention") if name in ("bias_k", "bias_v") else None


def _recurrent(module: nn.RNNBase, name: str) -> Reading | None:
    found = re.fullmatch(r"weight_(ih|hh|hr)_l\d+(_reverse)?", name)
    if found is None:
        return None
    if found[1] == "hr":
        return Reading(Kind.MATRIX, f"{_type(module)}, projection", "flatten")
    return _gates(module, name, GATES.get(module.mode, 1))


def _cell(module: nn.Module, name: str) -> Reading | None:
    gates = 4 if isinstance(module, nn.LSTMCell) else 3 if isinstance(module, nn.GRUCell) else 1
    return _gates(module, name, gates) if name in ("weight_ih", "weight_hh") else None


def _gates(module: nn.Module, name: str, gates: int) -> Reading:
    if gates == 1:
        return Reading(Kind.MATRIX, _type(module), "flatten")
    return Reading(Kind.MATRIX, f"{_type(module)}, {gates} gates", f"rows:{gates}")


def _bilinear(module: nn.Bilinear, name: str) -> Reading | None:
    return Reading(Kind.MATRIX, "Bilinear, of x1 ⊗ x2", "bilinear") if name == "weight" else None


def _embedding(module: nn.Module, name: str) -> Reading | None:
    return Reading(Kind.EMBEDDING, _type(module), "flatten") if name == "weight" else None


READERS: tuple[tuple[type | tuple[type, ...], Reader], ...] = (
    (nn.Linear, _linear),
    (_ConvNd, _conv),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
    ((nn.RNNCell, nn.LSTMCell, nn.GRUCell), _cell),
    (nn.Bilinear, _bilinear),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
)


def _of_another(module: nn.Module, name: str) -> str | None:
    """The attribute that an old-style hook (``torch.nn.utils.weight_norm``, ``spectral_norm``, ``prune``) computes from
    ``name_g``, ``name_v`` or ``name_orig``."""
    for ending in ("_g", "_v", "_orig"):
        base = name.removesuffix(ending)
        if base != name and base not in module._parameters and isinstance(getattr(module, base, None), Tensor):
            return base
    return None


def _type(module: nn.Module) -> str:
    """The type of torch.nn that it is, whatever its class is called (``fully_shard`` renames classes)."""
    public = (kind.__name__ for kind in type(module).__mro__ if getattr(nn, kind.__name__, None) is kind)
    return next(public, type(module).__name__)


def _kinds(parametrizations: ParametrizationList) -> str:
    return ", ".join(type(module).__name__.lstrip("_") for module in parametrizations)
