"""Initialization that starts where Norm Scaling's targets are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from numbers import Integral
from typing import Any

import torch
from torch import nn

from specopt.kernels import accumulation_dtype

from .deciding import Decided, Overrides, decide
from .reading import Kind
from .recording import LayerShapes
from .sharding.cut import Part, is_distributed
from .sharding.views import local_parts
from .targets import Target, is_positive, target_sigma
from .views.parts import parse, pieces


@torch.no_grad()
def scaled_orthogonal_(
    module: nn.Module,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    seed: int | None = None,
    target: Target = "channels",
    overrides: Overrides | None = None,
    inputs: Any = None,
    shapes: Mapping[str, LayerShapes] | None = None,
) -> nn.Module:
    """Every matrix of ``module``: orthogonal, times ``gain · σ*``, in place.

    The matrices, and the target σ* of each, are those of :func:`specopt.param_groups` with the same ``target``,
    ``overrides`` and ``inputs``: a conv kernel is read as ``(out, in·k·k)``, a transposed conv with its output channels
    as rows, a grouped one group by group, gates and packed projections one by one. All singular values of a matrix are
    then ``gain · σ*``: in float32 and float64 to 1e-5 at least; bfloat16 and float16 weights are computed in float32
    and rounded once, each entry by 2⁻⁹ or 2⁻¹² of itself at most. Frozen weights, embeddings, with what is tied to
    them, what an override turns off, other modules and all biases stay as they are.

    Of a DTensor every rank makes the whole matrix from the seed, one at a time, and keeps its part: on the same kind of
    device the bits are those of the same module when it was whole.

    Args:
        module: with its parameters in place.
        gain: a factor on all targets.
        generator: for the random numbers, drawn in the order of ``module.named_parameters()``; by default torch's
            global one, as ``torch.nn.init`` has it.
        seed: in place of a generator: each matrix is made from the seed and its own name, so the same seed gives the
            same bits in every call, whatever other layers there are and in whatever order. DTensors need one.
        target: as in :class:`specopt.NormScaleAdamW`, but for ``"initial"``.
        overrides, inputs, shapes: see :func:`specopt.param_groups`.

    Raises:
        ValueError: a gain that is not a positive finite number; a seed that is no integer, or beside a generator, or
            missing where a weight is a DTensor; ``"initial"``; a parameter not yet initialized; a weight that is
            parametrized (it is computed from other tensors, which this would leave as they are), unless an override
            turns it off; and what ``param_groups`` raises.

    Source: Norm Scaling (December 2023); Saxe et al., arXiv 1312.6120.

    Example::

        specopt.init.scaled_orthogonal_(model, seed=0, target="size", inputs=images)
    """
    if not is_positive(gain):
        raise ValueError(f"gain must be a positive finite number, got {gain!r}")
    _check_seed(seed, generator)
    decided = decide(module, overrides, {"target": target}, inputs=inputs, shapes=shapes)
    for one in decided:
        _check(one, seed)
    for one in decided:
        param = one.places[0].param
        if one.matrices is not None and param.requires_grad:
            view = parse(one.options["view"])
            found = local_parts(param, view) if is_distributed(param) else map(Part.all_of, pieces(param, view))
            for index, (part, sigma) in enumerate(zip(found, _targets(one), strict=True)):
                own = generator if seed is None else _seeded(seed, f"{one.name}[{index}]", part.here.device)
                _fill(part, gain * sigma, own)
    return module


def _check_seed(seed: Any, generator: torch.Generator | None) -> None:
    if seed is not None and generator is not None:
        raise ValueError(f"seed must not be given beside a generator, got {seed!r}")
    if seed is not None and (not isinstance(seed, Integral) or isinstance(seed, bool)):
        raise ValueError(f"seed must be an integer, got {seed!r}")


def _check(decided: Decided, seed: int | None) -> None:
    if decided.reading.kind is Kind.COMPUTED_FROM and decided.given.get("spectral") is not False:
        raise ValueError(f"{decided.name}: {decided.reading.why}; initialize the weight before it is parametrized")
    if decided.matrices is not None and decided.options.get("target") == "initial":
        raise ValueError(f"target of {decided.name} must be known before there is a weight, got 'initial'")
    if decided.matrices is not None and is_distributed(decided.places[0].param) and seed is None:
        raise ValueError(
            f"seed must be an integer for the DTensor {decided.name}, which all ranks are to make alike, got None: "
            "give one, or initialize before fully_shard"
        )


def _targets(decided: Decided) -> list[float]:
    """Of each matrix."""
    assert decided.matrices is not None
    count, shape = decided.matrices
    if "target" not in decided.beside:
        return [target_sigma(shape, decided.options["target"])] * count
    entry = decided.beside["target"]
    return list(entry) if isinstance(entry, list) else [entry] * count


def _seeded(seed: int, name: str, device: torch.device) -> torch.Generator | None:
    if device.type == "meta":  # where nothing is drawn
        return None
    digest = blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _fill(part: Part, sigma: float, generator: torch.Generator | None) -> None:
    rows, columns = part.shape[0], math.prod(part.shape[1:])
    matrix = torch.empty(rows, columns, device=part.here.device, dtype=accumulation_dtype(part.here.dtype))
    nn.init.orthogonal_(matrix, gain=sigma, generator=generator)
    part.take(matrix.view(part.shape))
