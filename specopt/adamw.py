"""AdamW with Norm Scaling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from specopt.kernels import Update

from . import updates
from .control import SpectralOptimizer
from .groups import resolve
from .rules import NormScale
from .targets import Target
from .views import Matrix


class NormScaleAdamW(SpectralOptimizer, AdamW):
    r"""``torch.optim.AdamW`` that sets the norm of every weight matrix after its update.

    ``norm="spectral"``: with the first singular triplet (σ₁, u₁, v₁) of the updated weight, ``mode="set"`` adds
    ``(σ* − σ₁) u₁v₁ᵀ``; ``"cap"`` does so where σ₁ > σ*; ``"rescale"`` multiplies by ``σ*/σ₁``. ``norm="frobenius"``:
    ``"set"`` multiplies by ``F*/‖W‖_F`` with ``F* = sqrt(min(rows, cols)) σ*``, ``"cap"`` where the norm is above it.

    The triplet comes from a block that follows the top of the spectrum by one pair of products a step, ``W V`` and
    ``Wᵀ U``, more in the first 20 steps. With ``rank=r`` the same is done with the first r triplets.

    Every argument of :class:`torch.optim.AdamW`, then, by keyword and per group:

    Args:
        params: what torch takes, or a Module, which means ``specopt.param_groups(module)``: matrices by module type.
        norm: ``"spectral"`` or ``"frobenius"``.
        mode: ``"set"``, ``"cap"`` or (spectral) ``"rescale"``.
        target: σ*: ``"channels"`` is ``sqrt(out/in)``, ``"fan"`` ``sqrt(out/(in·k·k))``, ``"size"``
            ``sqrt(size_out/size_in)`` of the layer with size ``C·H·W``, which :func:`specopt.param_groups` records,
            ``"initial"`` the norm of the weight before the first step (one that is zero or not finite then is left
            alone); or a positive number; or a callable,
            ``(specopt.MatrixInfo) -> float``, which is asked when a group is added. A group may hold a list, with a
            number for each of its parameters, or with a list of them for one that holds several matrices.
        rank: how many triplets are corrected, 1 to 16, or (under "cap") ``"full"``: every singular value, by products
            of whole matrices, after which none is above ``σ*(1 + 1e-5)`` in float32. (On a GPU that is so as long as
            none was above ``4 σ*``, but for the first time: see :func:`specopt.kernels.cap_`.) Under "set" each of
            them becomes σ*.
        every: the norm is looked at, and changed, in the first of so many steps; the others are AdamW's alone, and may
            carry it away from the target until the next look. Divides what control costs. Not with ``capturable``.
        raise_small: raise also a matrix that is all zero when control starts. By default it is only capped until it has
            reached σ* by itself.
        spectral: ``False`` turns control off for a group.
        view: how a group's tensors are read. ``"auto"`` controls 2-D tensors, and 4-D and 5-D ones with more than one
            input and output channel, read as ``(out, in·k·k)``, and names those that it leaves alone in a warning;
            ``"flatten"`` any tensor of two or more dimensions; for ``"transposed"``, ``"rows:G"`` and others see
            ``specopt/views/parts.py``. Matrices of a Module have views of their own.
        block: columns of a product, 1 to 64: the tracked block, and an eighth of them a probe of where the last
            update went. With a rank above 1, at least ``4·rank``.
        tolerance: residual ``‖Wᵀu₁ − σ₁v₁‖ / σ₁`` above which the next step makes a further pair of products.
        max_passes: the most pairs of products in a step; by default 16 in the first 20 steps, 2 later (on a CPU 16
            again where the block has lost σ₁, as a residual above 0.1 tells).
        stochastic_rounding: round bfloat16 and float16 weights up or down by chance, so that updates and corrections
            smaller than their last place count on average. The chance is seeded by the step: the same in every run.
            (torch itself makes, and rounds, the update of what is not controlled, and of a parameter that holds several
            matrices.) On a GPU with ``rank=1`` and a spectral norm alone; what else is in half precision is refused.

    Raises:
        ValueError: an option that makes no sense, naming it, its value and what it may be.

    Source: Norm Scaling (blog post and code, December 2023).

    Example::

        specopt.init.scaled_orthogonal_(model)
        optimizer = specopt.NormScaleAdamW(model.parameters(), lr=1e-3)
    """

    rule = NormScale()
    like_weight = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        norm: str = "spectral",
        mode: str = "set",
        target: Target = "channels",
        rank: int | str = 1,
        every: int = 1,
        raise_small: bool = False,
        spectral: bool = True,
        view: str = "auto",
        block: int = 32,
        tolerance: float = 0.01,
        max_passes: int | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        options: dict[str, Any] = {
            "norm": norm,
            "mode": mode,
            "target": target,
            "rank": rank,
            "every": every,
            "raise_small": raise_small,
            "spectral": spectral,
            "view": view,
            "block": block,
            "tolerance": tolerance,
            "max_passes": max_passes,
            "stochastic_rounding": stochastic_rounding,
            "conv": "matrix",
            "geometry": None,
        }
        self._construct(
            options,
            lambda: AdamW.__init__(
                self,
                resolve(params),
                lr,
                betas,
                eps,
                weight_decay,
                amsgrad,
                maximize=maximize,
                foreach=foreach,
                capturable=capturable,
                differentiable=differentiable,
                fused=fused,
            ),
        )

    def _update(self, matrix: Matrix) -> Update:
        return updates.adamw(self, matrix)
