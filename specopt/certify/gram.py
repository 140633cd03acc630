"""Upper bounds on spectral norms that hold for sure, rounding included: Gram iteration in float64.

For a matrix ``A`` of (q, p), p <= q (else of its adjoint), with ``‖·‖`` the spectral and ``‖·‖_F`` the Frobenius norm:

    N₀ = AᴴA,   H_t = N_t / f_t  (f_t a power of two near ‖N_t‖_F: no rounding),   N_{t+1} = H_tᴴH_t
    ‖A‖² = ‖N₀‖,   ‖N_t‖ = f_t ‖H_t‖,   ‖H_t‖² = ‖N_{t+1}‖,   ‖N_T‖ <= min(‖N_T‖_F, √(‖N_T‖_1 ‖N_T‖_∞))

so that the last of these, taken back through the others, bounds ``‖A‖`` by at most ``p^(1/2^(T+2))`` times itself.
Source: Delattre et al., "Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration", arXiv
2305.16173. The row and column sums beside the Frobenius norm make an orthogonal matrix tight at once.

**Rounding.** What is computed in place of ``BᴴB``, B of (r, p), differs from it by ``E``, ``|E| <= γ |B|ᴴ|B|`` entry by
entry, with ``γ = n u / (1 − n u)``, n = r for a real B, in whatever order the products are summed (Higham, Accuracy and
Stability of Numerical Algorithms, §3.5), so ``‖E‖ <= ‖E‖_F <= γ ‖B‖_F²``. Hence with N standing for what was computed

    ‖A‖² <= ‖N₀‖ + γ ‖A‖_F²,   ‖H_t‖² <= ‖N_{t+1}‖ + γ ‖H_t‖_F²

which is what :func:`largest_norm` takes back, every number on the way rounded up. u is taken as 2⁻⁵², twice the unit
roundoff of float64; the other half is far above what underflow adds, since A is first multiplied by the power of two
that brings its largest entry into [1/2, 1). For complex matrices n = 8 r, which covers ``√2 γ_{2r}`` of the common
product and that of three real ones. The allowances are about ``p·q·2⁻⁵²`` of the bound: 1e-8 at (16384, 4096). Assumed:
IEEE arithmetic and products of the common kind, as MKL, OpenBLAS, cuBLAS and rocBLAS make them for float64; none of
Strassen's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""How far the bound may lie above the norm, relatively."""
UNIT = 2.0**-52
SMALLEST = 5e-324


def gamma(count: int) -> float:
    """``γ = n u / (1 − n u)`` for sums of n products, with u twice the unit roundoff."""
    return up(count * UNIT / (1 - count * UNIT))


def up(value: float) -> float:
    """At least what one or a few roundings of positive numbers have left of a value: four ulps more."""
    return value * (1 + 2.0**-50) if value > 1e-290 or value == 0 else math.nextafter(value, 1)


def times(*factors: float) -> float:
    """A product of bounds, rounded up. Nothing times infinity is infinite: what is not known outweighs a zero."""
    if math.inf in factors:
        return math.inf
    others = [factor for factor in factors if factor != 1]
    product = others[0] if others else 1.0
    for factor in others[1:]:
        product = up(product * factor or SMALLEST) if product and factor else 0.0
    return product


def root(value: float) -> float:
    """A square root, rounded up; exact for the squares of integers."""
    if value < 2**52 and value == int(value) and math.isqrt(int(value)) ** 2 == value:
        return float(math.isqrt(int(value)))
    return up(math.sqrt(value))


def total(values: list[float]) -> float:
    """A sum of bounds, rounded up."""
    return values[0] if len(values) == 1 else up(sum(values) * (1 + gamma(len(values))))


def in_double(weight: Tensor) -> Tensor:
    """The same numbers in float64, where float64 is computed: nothing is rounded on the way."""
    weight = weight.detach()
    here = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    return weight.to(here).to(torch.float64)


def largest_norm(matrices: Tensor, tolerance: float = TOLERANCE, floor: float = 0.0) -> float:
    """A bound on ``max_b ‖A_b‖`` that is never below it, and at most ``1 + tolerance`` times it but for rounding
    (see above).

    Args:
        matrices: ``(m, n)`` or ``(B, m, n)``, float64 or complex128.
        tolerance: reached after at most ``log2(ln(p) / tolerance) - 1`` products of (p, p) with p the smaller side.
        floor: what is found to be below it is not looked at any closer.

    Returns:
        0 for matrices that are empty or zero, inf where an entry is not finite.
    """
    matrices = matrices if matrices.ndim == 3 else matrices[None]
    if matrices.numel() == 0:
        return 0.0
    parts = torch.view_as_real(matrices.resolve_conj()) if matrices.is_complex() else matrices
    if not bool(parts.isfinite().all()):
        return math.inf
    if not bool(parts.any()):
        return 0.0
    exponent = exponent_of(parts)
    scaled = times_power(matrices, -exponent)
    tall = scaled if scaled.shape[1] >= scaled.shape[2] else scaled.mH
    half = -exponent // 2
    return unscaled(_refined(tall, tolerance, floor * 2.0**half * 2.0 ** (-exponent - half)), exponent)


def exponent_of(numbers: Tensor) -> int:
    """e with the largest of finite numbers in ``[2^(e-1), 2^e)``."""
    return math.frexp(float(numbers.abs().max()))[1]


def times_power(matrices: Tensor, exponent: int) -> Tensor:
    """``2^exponent A`` without rounding; in two factors, since the power itself may leave float64's range."""
    half = exponent // 2
    return matrices * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


def unscaled(bound: float, exponent: int) -> float:
    """``2^exponent`` times a bound, rounded up."""
    try:
        return up(math.ldexp(bound, exponent) or (SMALLEST if bound else 0.0))
    except OverflowError:
        return math.inf


def _refined(tall: Tensor, tolerance: float, floor: float) -> float:
    """The iteration on (B, q, p), p <= q. Members leave it once they are tight or cannot be the largest."""
    product, errors = tall.mH @ tall, [_rounding_errors(tall)]
    powers: list[Tensor] = []
    bound = 0.0
    for remaining in reversed(range(_most_products(tall.shape[2], tolerance) + 1)):
        norms = _frobenius(product)
        uppers = _taken_back(_upper(product, norms), powers, errors)
        lowers = _taken_back(_lower(product, norms), powers, [torch.zeros_like(error) for error in errors])
        floor = max(floor, (1 + tolerance) * float(lowers.max()))
        going = (uppers > floor) & (remaining > 0)
        bound = max([bound, *uppers[~going].tolist()])
        if not bool(going.any()):
            break
        product = product[going]
        powers, errors = [power[going] for power in powers], [error[going] for error in errors]
        powers.append(_power_near(norms[going]))
        half = product / powers[-1][:, None, None]
        product = half.mH @ half
        errors.append(_rounding_errors(half))
    return bound


def _taken_back(norms: Tensor, powers: list[Tensor], errors: list[Tensor]) -> Tensor:
    """From ``‖N_T‖`` through ``‖H_t‖ <= √(‖N_{t+1}‖ + e_{t+1})`` and ``‖N_t‖ = f_t ‖H_t‖`` to ``‖A‖`` (B,)."""
    for power, error in zip(reversed(powers), reversed(errors[1:]), strict=True):
        norms = power * torch.sqrt(norms + error) * (1 + 2.0**-49)
    return torch.sqrt(norms + errors[0]) * (1 + 2.0**-49)


def _most_products(side: int, tolerance: float) -> int:
    """T with ``side^(1/2^(T+2)) <= 1 + tolerance``."""
    if side == 1:
        return 0
    return max(0, math.ceil(math.log2(math.log(side) / math.log1p(tolerance))) - 2)


def _rounding_errors(factors: Tensor) -> Tensor:
    """``γ ‖B‖_F²`` (B,), rounded up: of the products of the adjoints of factors (B, r, p) and the factors."""
    norms = _frobenius(factors)
    return norms * norms * (gamma((8 if factors.is_complex() else 1) * factors.shape[1]) * (1 + 2.0**-48))


def _frobenius(matrices: Tensor) -> Tensor:
    """``‖A_b‖_F`` (B,), rounded up."""
    parts = torch.view_as_real(matrices.resolve_conj()) if matrices.is_complex() else matrices
    norms: Tensor = torch.linalg.vector_norm(parts.flatten(1), dim=1)
    return norms * (1 + gamma(2 * matrices[0].numel() + 8))


def _power_near(norms: Tensor) -> Tensor:
    """The power of two (B,) next above a norm, exactly: written as its exponent's bits."""
    exponents = torch.frexp(norms)[1].long()
    powers: Tensor = torch.bitwise_left_shift(exponents.clamp_min(-1000) + 1023, 52).view(torch.float64)
    return powers


def _upper(matrices: Tensor, norms: Tensor) -> Tensor:
    """``min(‖N‖_F, √(‖N‖_1 ‖N‖_∞))`` (B,), rounded up."""
    sizes = matrices.abs()
    sums = torch.sqrt(sizes.sum(1).amax(1)) * torch.sqrt(sizes.sum(2).amax(1))
    return torch.minimum(norms, sums * (1 + gamma(matrices.shape[1] + 16)))


def _lower(matrices: Tensor, norms: Tensor) -> Tensor:
    """``‖N‖_F² / tr N <= ‖N‖`` (B,) for a positive semidefinite N. Tells how tight a bound is, and is in none."""
    traces = matrices.diagonal(dim1=1, dim2=2).real.sum(1)
    return torch.where(traces > 0, norms * norms / traces.clamp_min(1e-300), 0.0)
