"""The judge of random cases, in float64.

It makes each step from the state that the optimizer is in: plain torch in float64 makes the base update, and the rule
is applied by SVD to what it leaves (for the penalty: to the gradient that it gets).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from specopt.tracker.common import STATS, STEP, Stat
from specopt.views import is_controlled
from tests.specopt.fuzz import Case
from tests.specopt.helpers import DEVICE

STEPS = 2


def run(case: Case) -> None:
    """Raises AssertionError where a step of the case is not what the judge makes of it."""
    random_numbers = torch.Generator().manual_seed(case.seed)
    param = case.make_weight(random_numbers).requires_grad_()
    initial = norms(param)
    optimizer = case.make(param)
    controlled = is_controlled(param, optimizer.param_groups[0]) and case.options.get("snr_lambda") != 0
    for step in range(STEPS):
        param.grad = case.make_gradient(random_numbers)
        before, grad = param.detach().clone(), None if param.grad is None else param.grad.clone()
        state = copy.deepcopy(optimizer.state_dict()["state"].get(0, {}))
        optimizer.step()
        if grad is None:
            assert same(param, before), "moved without a gradient"
            continue
        after = optimizer.state[param]
        plain = base_step(case, before, grad, state, like=param)
        if not controlled:
            assert same(param, plain), "not controlled, and not what the base makes"
            continue
        assert same(param.grad, grad), "the gradient was changed"  # torch's own foreach SGD does so under nesterov
        assert after[STEP] == step + 1, "the step was not counted"
        assert bool((param.isfinite() | ~plain.isfinite()).all()), "an entry that the base leaves finite is not"
        if "bad" in (case.gradient, case.weight):
            continue
        if float(case.options["lr"]) == 0:
            assert same(param, before), "moved at a learning rate of 0"
        elif case.penalty:
            judge_penalty(case, before, param.detach(), grad, state, after)
        else:
            judge_norm(case, before, param.detach(), grad, state, after, initial)


def same(mine: Tensor | None, other: Tensor) -> bool:
    return mine is not None and torch.equal(mine.detach().nan_to_num(7.0), other.nan_to_num(7.0))


def base_step(case: Case, weight: Tensor, grad: Tensor, state: dict[str, Any], like: Tensor | None = None) -> Tensor:
    """The weight after plain torch's step, from the base's part of the state: in float64, or as ``like`` is stored."""
    judging = like is None
    dtype, strides = (torch.float64, weight.stride()) if like is None else (like.dtype, like.stride())
    cls, options = case.base
    if judging:
        options = {**options, "lr": float(options["lr"])}  # torch computes with a tensor's in float32
    other = torch.empty_strided(weight.shape, strides, dtype=dtype, device=DEVICE)
    other = other.copy_(weight).requires_grad_()
    plain = cls([other], **copy.deepcopy(options))
    kept = {key: value for key, value in copy.deepcopy(state).items() if not key.startswith("spectral_")}
    if kept:
        plain.state[other] = {k: v if v.ndim == 0 and k == "step" else v.to(dtype) for k, v in kept.items()}
    other.grad = grad.to(dtype, copy=True)
    plain.step()
    result: Tensor = other.detach()
    return result


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(weight.double().flatten(1), full_matrices=False)


def norms(weight: Tensor) -> dict[str, float]:
    if weight.ndim < 2 or weight.numel() == 0 or not bool(weight.isfinite().all()):
        return {"spectral": math.nan, "frobenius": math.nan}
    values = svd(weight.detach())[1]
    return {"spectral": float(values[0]), "frobenius": float(values.norm())}


def is_exact(case: Case) -> bool:
    """Whether the matrix is solved, not tracked."""
    matrix = (case.shape[0], math.prod(case.shape[1:]))
    return min(matrix) <= min(2 * case.options["block"], 64)


def computed(case: Case) -> float:
    """How far a number may be off by what it was computed with: sums of up to a thousand terms, in 64 bits for float64
    weights and in 32 for others. With a learning rate in a tensor torch's own update has 32 bits in any case."""
    double = case.dtype == torch.float64 and not isinstance(case.options["lr"], Tensor)
    return 64 * torch.finfo(torch.float64 if double else torch.float32).eps


def rounding(case: Case) -> float:
    """The same of a number that is stored in the weight's dtype. A weight is rounded when the base has updated it and
    when it is corrected, each time to the nearest (half an eps) or, by chance, to either side (one)."""
    return computed(case) + 2 * torch.finfo(case.dtype).eps


def direction_error(case: Case, values: Tensor) -> float:
    """How far ``u₁v₁ᵀ`` may be off: by the error of the weight it is computed from, over the gap that tells it from the
    next. Without a gap any direction of the flat part will do."""
    gap = 1.0 if len(values) == 1 else float((values[0] - values[1]) / values[0])
    half = case.dtype in (torch.bfloat16, torch.float16)
    error = 4 * (rounding(case) if half else computed(case)) * float(values.norm() / values[0])
    return min(2.0, error / gap) if gap > 0 else 2.0


def sigma_error(case: Case) -> float:
    """How far a tracked sigma may be off, from below, in the first steps on noise: a lone vector is the plain power
    iteration, a few do better, and eight are within a tenth of the tolerance. Twice to five times what was found; more
    where passes are few."""
    block, few = case.options["block"], case.options.get("max_passes") == 4
    if block < 8:
        return (0.25 if few else 0.08) if block == 1 else (0.08 if few else 0.02)
    return 5e-3 if few else 1e-3


def judge_penalty(
    case: Case, before: Tensor, ours: Tensor, grad: Tensor, state: dict[str, Any], after: dict[str, Any]
) -> None:
    u, s, vh = svd(before)
    sigma = float(s[0])
    found = float(after[STATS][Stat.SIGMA])
    slack = rounding(case)
    strength = case.options["snr_lambda"] * (-1 if case.options["maximize"] else 1)
    assert found <= sigma * (1 + slack), "sigma found is above any there is"
    unpenalized = base_step(case, before, grad, state)
    penalty = strength * sigma * torch.outer(u[:, 0], vh[0]).view(before.shape)
    expected = base_step(case, before, grad.double() + penalty, state)
    allowed = slack * float(before.double().norm() + (expected - before).norm() + (unpenalized - before).norm())
    share = float((expected - unpenalized).norm())
    allowed += (
        slack * float(case.options["lr"]) * float(sum(v.double().norm() for k, v in state.items() if "buffer" in k))
    )
    tiny = torch.finfo(case.dtype).tiny * before.numel() ** 0.5
    if sigma > 0:
        share *= found / sigma
    assert abs(float((ours - unpenalized).norm()) - share) <= allowed + tiny, "a penalty of another size"
    if is_exact(case):
        assert abs(found - sigma) <= slack * float(s.norm()) + tiny, "sigma is not that of the weight"
        assert float((ours - expected).norm()) <= allowed + share * direction_error(case, s) + tiny, "another step"
    else:
        assert found >= sigma * (1 - sigma_error(case)) - tiny, "sigma is lost"


def judge_norm(
    case: Case,
    before: Tensor,
    ours: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    after: dict[str, Any],
    initial: dict[str, float],
) -> None:
    plain = base_step(case, before, grad, state)
    slack = rounding(case)
    kind = case.options["norm"]
    tiny = torch.finfo(case.dtype).tiny * before.numel() ** 0.5
    if not bool(plain.to(case.dtype).any()):
        assert not bool(ours.any()), "a zero matrix does not stay zero"
        return
    u, s, vh = svd(plain)
    norm = float(s[0] if kind == "spectral" else s.norm())
    found = float(after[STATS][Stat.SIGMA]) if kind == "spectral" else norm
    error = slack * float(plain.norm() + (plain - before).norm()) + tiny
    exact = is_exact(case) or kind == "frobenius"
    assert abs(found - norm) <= error if exact else norm * (1 - sigma_error(case)) - error <= found <= norm + error, (
        "sigma"
    )
    target = target_of(case, initial, after)
    capped = case.options["mode"] == "cap" or starts_from_zero(case, before, state) or math.isinf(target)
    wanted = min(found, target) if capped else target
    if kind == "frobenius" or case.options["mode"] == "rescale":
        expected = plain * (wanted / found)
    else:
        expected = plain + (wanted - found) * torch.outer(u[:, 0], vh[0]).view(plain.shape)
    allowed = error * (1 + wanted / found) + slack * float(expected.norm())
    moved = float((expected - plain).norm())
    assert abs(float((ours - plain).norm()) - moved) <= allowed, "a correction of another size"
    if kind == "frobenius" or case.options["mode"] == "rescale":
        assert float((ours - expected).norm()) <= allowed, "another correction"
    elif exact:
        assert float((ours - expected).norm()) <= allowed + moved * direction_error(case, s), "another correction"


def target_of(case: Case, initial: dict[str, float], after: dict[str, Any]) -> float:
    target, kind = case.options["target"], case.options["norm"]
    if target == "initial":
        noted = float(after[f"spectral_initial_{kind}"])
        if math.isnan(noted):
            assert initial[kind] == 0, "no norm to keep of a weight that has one"
            return math.inf
        allowed = rounding(case) * 64 if is_exact(case) or kind == "frobenius" else sigma_error(case)
        assert abs(noted - initial[kind]) <= allowed * initial[kind], "another initial norm"
        return noted
    rows, columns = case.shape[0], math.prod(case.shape[1:])
    across = {"channels": case.shape[1], "fan": columns}
    sigma = math.sqrt(rows / across[target]) if target in across else float(target)
    return sigma * math.sqrt(min(rows, columns)) if kind == "frobenius" else sigma


def starts_from_zero(case: Case, before: Tensor, state: dict[str, Any]) -> bool:
    """Whether the weight was zero when control began, and has not reached its target since."""
    began = not bool(before.any()) if STATS not in state else bool(state[STATS][Stat.CAPPED])
    return began and not case.options["raise_small"]
