"""Random cases of one parameter under one of the optimizers. A case is its seed: ``run(Case.of(seed))`` of
:mod:`tests.specopt.judge` runs one again."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import specopt
from tests.specopt.helpers import DEVICE

SIDES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 31, 33, 40, 66)
SCALES = {
    torch.float64: (1e-30, 1e-8, 1.0, 1.0, 1.0, 1e8, 1e30),
    torch.float32: (1e-30, 1e-8, 1.0, 1.0, 1.0, 1e8, 1e30),
    torch.bfloat16: (1e-30, 1e-8, 1.0, 1.0, 1.0, 1e8, 1e30),
    torch.float16: (1e-2, 1.0, 1e2),  # what it can hold
}
TIGHT: dict[str, Any] = {"tolerance": 1e-6, "max_passes": 60}


@dataclass
class Case:
    """What a seed stands for."""

    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float
    layout: str
    """Of the weight: "plain", "turned" (its matrix transposed in memory), "channels last" or "strided"."""
    gradient: str
    """"plain", "turned", "zero", "absent" or "bad" (one entry is not finite)."""
    weight: str
    """"random", "zero", "rank one", "flat" (equal singular values) or "bad"."""
    penalty: bool
    """SNRSGD, else NormScaleAdamW."""
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int, *, interpreted: bool = False) -> Case:
        """``interpreted``: smaller, with fewer passes, for an interpreter takes its time."""
        pick = random.Random(seed)
        sides = [side for side in SIDES if side <= 24] if interpreted else SIDES
        dtype = pick.choice(list(SCALES))
        ndim = pick.choice((2, 2, 2, 2, 4, 4, 5, 3, 1, 0))
        shape = tuple(pick.choice(sides) for _ in range(min(ndim, 2))) + tuple(
            pick.choice((1, 2, 3)) for _ in range(ndim - 2)
        )
        case = cls(
            seed,
            shape,
            dtype,
            pick.choice(SCALES[dtype]),
            pick.choice(("plain", "plain", "turned", "channels last", "strided")),
            pick.choice(("plain",) * 8 + ("turned", "turned", "zero", "absent", "bad")),
            pick.choice(("random",) * 8 + ("zero", "rank one", "flat", "bad")),
            pick.random() < 0.4,
        )
        case.options = case._penalty(pick) if case.penalty else case._norm_scale(pick)
        case.options |= case._shared(pick)
        if (interpreted or DEVICE.type != "cpu") and case.options.get("norm") == "frobenius":
            case.options["stochastic_rounding"] = False  # refused in half precision
        if interpreted:
            case.options["max_passes"] = 4
        return case

    def _shared(self, pick: random.Random) -> dict[str, Any]:
        rate = pick.choice((0.0, 1e-33, 1e-3, 1e-3, 1e-2, 1e-2, 0.1))
        tensor = pick.random() < 0.15
        return {
            "lr": torch.tensor(rate) if tensor else rate,
            "maximize": pick.random() < 0.2,
            "weight_decay": pick.choice((0, 0, 0.1)),
            "foreach": False if tensor else pick.choice((None, None, True, False)),
            "block": pick.choice((1, 2, 3, 4, 8, 16, 32, 32, 32, 33, 64)),
            "spectral": pick.random() > 0.05,
            "view": pick.choice(("auto", "auto", "flatten")),
            "stochastic_rounding": pick.random() < 0.15,
            **(TIGHT if pick.random() < 0.6 else {}),
        }

    def _penalty(self, pick: random.Random) -> dict[str, Any]:
        momentum = pick.choice((0, 0.9))
        nesterov = momentum > 0 and pick.random() < 0.3
        return {
            "momentum": momentum,
            "nesterov": nesterov,
            "dampening": 0 if nesterov else pick.choice((0, 0.3)),
            "snr_lambda": pick.choice((0.0, 0.01, 0.3, 1.0)),
        }

    def _norm_scale(self, pick: random.Random) -> dict[str, Any]:
        norm = pick.choice(("spectral", "spectral", "spectral", "frobenius"))
        half = self.dtype in (torch.bfloat16, torch.float16)
        return {
            "norm": norm,
            "mode": pick.choice(("set", "cap", "rescale") if norm == "spectral" else ("set", "cap")),
            "target": pick.choice(("channels", "fan", "initial", 0.3, 5.0)),
            "raise_small": pick.random() < 0.2,
            "amsgrad": pick.random() < 0.2,
            "betas": (0.8, 0.9) if half else pick.choice(((0.9, 0.999), (0.0, 0.9))),
            "eps": 1e-3 if half else 1e-8,  # float16 has no 1e-8
        }

    def make_weight(self, random_numbers: torch.Generator) -> Tensor:
        values = torch.randn(self.shape, generator=random_numbers, dtype=torch.float64)
        if len(self.shape) > 1 and values.numel():
            u, s, vh = torch.linalg.svd(values.flatten(1), full_matrices=False)
            if self.weight == "rank one":
                values = (s[0] * torch.outer(u[:, 0], vh[0])).view(self.shape)
            elif self.weight == "flat":
                values = (u @ vh).view(self.shape)
        if self.weight == "zero":
            values = torch.zeros_like(values)
        weight = self._laid_out((values * self.scale).to(DEVICE, self.dtype), self.layout)
        if self.weight == "bad" and weight.numel():
            weight[(0,) * weight.ndim] = math.inf if self.seed % 2 else math.nan
        return weight

    def make_gradient(self, random_numbers: torch.Generator) -> Tensor | None:
        if self.gradient == "absent":
            return None
        values = torch.randn(self.shape, generator=random_numbers, dtype=torch.float64)
        values *= 0.0 if self.gradient == "zero" else self.scale if self.penalty else 1.0
        gradient = self._laid_out(values.to(DEVICE, self.dtype), "turned" if self.gradient == "turned" else "plain")
        if self.gradient == "bad" and gradient.numel():
            gradient[(-1,) * gradient.ndim] = math.nan if self.seed % 2 else -math.inf
        return gradient

    @staticmethod
    def _laid_out(values: Tensor, layout: str) -> Tensor:
        if layout == "turned" and values.ndim == 2:
            return values.mT.contiguous().mT
        if layout == "channels last" and values.ndim in (4, 5):
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            return values.contiguous(memory_format=formats[values.ndim])
        if layout == "strided" and values.ndim == 2:
            rows, columns = values.shape
            wide = values.new_full((rows + 1, 2 * columns + 3), 7.0)
            wide[:rows, 1 : 2 * columns + 1 : 2] = values
            return wide[:rows, 1 : 2 * columns + 1 : 2]
        return values

    @property
    def kind(self) -> Any:
        return specopt.SNRSGD if self.penalty else specopt.NormScaleAdamW

    def make(self, param: Tensor) -> Any:
        return self.kind([param], **self.options)

    @property
    def base(self) -> tuple[Any, dict[str, Any]]:
        """The base class and its share of the options."""
        options = {name: value for name, value in self.options.items() if name not in self.kind.rule.names}
        return torch.optim.SGD if self.penalty else torch.optim.AdamW, options
