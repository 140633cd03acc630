"""What is compared: training without control, with a term in the loss, and with a rule in the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

import specopt
from specopt.targets import MatrixInfo

from .objective import PENALTIES

BASES = ("sgd", "adamw", "adam")
DECAYED = ("all", "convolutions")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Method:
    """One column of a table.

    Raises:
        ValueError: a base that is not known, or a number that is negative or not finite.
    """

    name: str
    base: str = "sgd"
    """``"sgd"`` with momentum, ``"adamw"`` or ``"adam"``."""
    weight_decay: float = 0.0
    """Coupled under SGD and Adam, decoupled under AdamW."""
    decayed: str = "all"
    """Which parameters: ``"all"``, or the weights of ``"convolutions"`` alone."""
    adversarial: float = 0.0
    """epsilon: the l2 norm by which each input of the loss' second half is moved; 0 for none."""
    penalty: str = ""
    """A name of :data:`papers.objective.PENALTIES`, for what is added to the loss; none by default."""
    penalty_weight: float = 0.0
    """lambda of the penalty."""
    snr_lambda: float = 0.0
    """lambda of the spectral norm regularization ``lambda/2 sum sigma_1^2``; 0 for none."""
    norm_scale: Mapping[str, Any] = field(default_factory=dict)
    """Options of :class:`specopt.NormScale` but for the target; empty for none."""
    target: str = "size"
    gain: float = 1.0
    """On all targets."""
    spared: tuple[str, ...] = ("*downsample*",)
    """Patterns of modules that rules leave alone."""

    def __post_init__(self) -> None:
        for name, choices in (("base", BASES), ("decayed", DECAYED), ("penalty", ("", *PENALTIES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if self.penalty and self.adversarial:
            raise ValueError(f"penalty {self.penalty!r} and adversarial {self.adversarial:g} exclude each other")
        for name in ("weight_decay", "adversarial", "penalty_weight", "snr_lambda", "gain"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")

    @property
    def frobenius(self) -> bool:
        """Whether weights are scaled to a Frobenius norm."""
        return self.norm_scale.get("norm") == "frobenius"

    @property
    def rules(self) -> list[Any]:
        """What is attached to the base optimizer."""
        found: list[Any] = [specopt.SpectralPenalty(self.snr_lambda)] if self.snr_lambda else []
        return [*found, specopt.NormScale(**self.norm_scale)] if self.norm_scale else found


def optimizer_for(
    method: Method, model: nn.Module, inputs: Tensor, *, lr: float, momentum: float, one_target: bool = False
) -> torch.optim.Optimizer:
    """The base optimizer of ``method``, under its rules.

    Args:
        inputs: a small batch, of which ``target="size"`` records the layers' sizes.
        momentum: of SGD.
        one_target: every layer has the first one's target norm, as in Norm Scaling's published runs.
    """
    return optimizer_of(method, groups_of(method, model, inputs, one_target), lr=lr, momentum=momentum)


def optimizer_of(method: Method, groups: Any, *, lr: float, momentum: float) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": lr, "weight_decay": method.weight_decay}
    if method.base == "sgd":
        base: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=momentum, **options)
    else:
        base = (torch.optim.AdamW if method.base == "adamw" else torch.optim.Adam)(groups, **options)
    rules = method.rules
    if not rules:
        return base
    return specopt.wrap(base, rules[0] if len(rules) == 1 else specopt.Compose(*rules))


def groups_of(method: Method, model: nn.Module, inputs: Tensor, one_target: bool = False) -> list[dict[str, Any]]:
    """Of the model's parameters, with names, what decays apart from what does not."""
    if method.rules:
        return controlled_groups(method, model, inputs, one_target)
    kept = undecayed(method, model)
    parts = [
        [(name, param) for name, param in model.named_parameters() if (name in kept) is out] for out in (False, True)
    ]
    return [{"params": part} | ({"weight_decay": 0.0} if out else {}) for out, part in enumerate(parts) if part]


def undecayed(method: Method, model: nn.Module) -> set[str]:
    """Names of parameters that the method's decay leaves alone."""
    if method.decayed == "all":
        return set()
    filters = {name for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}
    return {name for name, _ in model.named_parameters()} - {f"{name}.weight" for name in filters}


def controlled_groups(method: Method, model: nn.Module, inputs: Tensor, one_target: bool) -> list[dict[str, Any]]:
    """``specopt.param_groups`` of the model, with targets as numbers where the method has any."""
    overrides: dict[str, Any] = {name: {"weight_decay": 0.0} for name in undecayed(method, model)}
    for pattern in spared(method, model):
        overrides[pattern] = {"spectral": False}
    if not method.norm_scale:
        return specopt.param_groups(model, overrides=overrides, weight_decay=method.weight_decay)
    target: Any = frobenius_target(model, inputs) if (method.frobenius and method.target == "size") else method.target
    groups = specopt.param_groups(
        model, overrides=overrides, weight_decay=method.weight_decay, target=target, inputs=inputs
    )
    if one_target:
        share_first_target(groups, frobenius=method.frobenius)
    for group in groups:
        if isinstance(group.get("target"), list):
            group["target"] = [None if entry is None else scaled(entry, method.gain) for entry in group["target"]]
    return groups


def frobenius_target(model: nn.Module, inputs: Tensor) -> Callable[[MatrixInfo], float]:
    """Norm Scaling's ``F* = sqrt(min(d_k, d_{k-1})·d_k/d_{k-1})`` of layer sizes ``d = C·H·W``, as what specopt takes:
    ``F* / sqrt(min(rows, columns))``, with rows and columns of the matrix (out, in·k·k).

    Of a Linear that is ``sqrt(out/in)``. Of a convolution sizes are far above the matrix' sides: F* of 64 channels to
    64 at 32 x 32 is 256, where a matrix of singular values ``sqrt(d_k/d_{k-1})`` has 8.
    """
    shapes = specopt.record_shapes(model, inputs)

    def target(matrix: MatrixInfo) -> float:
        found = shapes[matrix.name]
        rows, columns = matrix.shape[:2]  # a group of a convolution has its share of both sizes
        given, taken = rows * math.prod(found.output[1:]), columns * math.prod(found.input[1:])
        return math.sqrt(min(given, taken) / min(rows, math.prod(matrix.shape[1:]))) * math.sqrt(given / taken)

    return target


def share_first_target(groups: list[dict[str, Any]], *, frobenius: bool) -> None:
    """Gives every weight the target norm of the first one that has a target: sigma*, or F*."""
    first = None
    for group in groups:
        targets: Any = group.get("target")
        for i, (_, weight) in enumerate(group["params"] if isinstance(targets, list) else ()):
            if targets[i] is not None:
                root = math.sqrt(min(weight.flatten(1).shape)) if frobenius else 1.0
                first = first or targets[i] * root
                targets[i] = first / root


def scaled(entry: float | list[float], gain: float) -> float | list[float]:
    return [gain * sigma for sigma in entry] if isinstance(entry, list) else gain * entry


def spared(method: Method, model: nn.Module) -> list[str]:
    """Those patterns that match a module of the model."""
    names = [name for name, _ in model.named_modules()]
    return [pattern for pattern in method.spared if any(fnmatch(name, pattern) for name in names)]


def start_orthogonal(model: nn.Module, inputs: Tensor, seed: int) -> None:
    """Norm Scaling's initialization, of every matrix: orthogonal, times ``sqrt(size_out/size_in)`` of its layer. It
    does not ask for the method, so that all methods of a row start from the same weights."""
    specopt.init.scaled_orthogonal_(model, target="size", inputs=inputs, seed=seed)
