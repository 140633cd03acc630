"""SGD with spectral norm regularization."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import ParamsT

from specopt.kernels import Update

from . import updates
from .control import SpectralOptimizer
from .groups import resolve
from .rules import SpectralPenalty
from .views import Matrix


class SNRSGD(SpectralOptimizer, SGD):
    r"""``torch.optim.SGD`` whose objective gains ``λ/2 · Σ σ₁(W)²`` over the weight matrices.

    In each step the gradient of every matrix gains ``λ σ₁ u₁v₁ᵀ``; then SGD runs as it is (momentum, dampening,
    Nesterov and weight decay see the penalized gradient). ``(σ₁, u₁, v₁)`` come from a block that follows the top of
    the spectrum by one half product a step, ``W V`` and ``Wᵀ U`` in turn. ``p.grad`` is left as it was.

    Every argument of :class:`torch.optim.SGD`, then, by keyword and per group:

    Args:
        params: what torch takes, or a Module, which means ``specopt.param_groups(module)``: matrices by module type.
        snr_lambda: λ >= 0. (Where a text writes the penalty ``λ ‖W‖₂²`` without the half, its λ is half of this.)
        spectral: ``False`` turns control off for a group.
        view: how a group's tensors are read. ``"auto"`` controls 2-D tensors, and 4-D and 5-D ones with more than one
            input and output channel, read as ``(out, in·k·k)``, and names those that it leaves alone in a warning;
            ``"flatten"`` any tensor of two or more dimensions; for ``"transposed"``, ``"rows:G"`` and others see
            ``specopt/views/parts.py``. Matrices of a Module have views of their own.
        block: columns of a product, 1 to 64: the tracked block, and an eighth of them a probe of where the weight went.
        tolerance: residual ``‖Wᵀu₁ − σ₁v₁‖ / σ₁`` above which a step makes a further pair of products.
        max_passes: the most pairs of products in a step; by default 16 in the first 20 steps, 2 later (on a CPU 16
            again where the block has lost σ₁, as a residual above 0.1 tells).
        stochastic_rounding: round bfloat16 and float16 weights up or down by chance, so that updates and corrections
            smaller than their last place count on average. The chance is seeded by the step: the same in every run.
            (torch itself makes, and rounds, the update of what is not controlled, of everything while ``snr_lambda`` is
            0, and of a parameter that holds several matrices.)

    Raises:
        ValueError: an option that makes no sense, naming it, its value and what it may be.

    Source: Yoshida and Miyato, Spectral norm regularization for improving the generalizability of deep learning, arXiv
    1705.10941.

    Example::

        optimizer = specopt.SNRSGD(model.parameters(), lr=0.1, momentum=0.9, snr_lambda=0.01)
    """

    rule = SpectralPenalty()
    like_weight = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        snr_lambda: float = 0.01,
        spectral: bool = True,
        view: str = "auto",
        block: int = 32,
        tolerance: float = 0.01,
        max_passes: int | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        options: dict[str, Any] = {
            "snr_lambda": snr_lambda,
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
            lambda: SGD.__init__(
                self,
                resolve(params),
                lr,
                momentum,
                dampening,
                weight_decay,
                nesterov,
                maximize=maximize,
                foreach=foreach,
                differentiable=differentiable,
                fused=fused,
            ),
        )

    def _update(self, matrix: Matrix) -> Update:
        return updates.sgd(self, matrix)
