"""The block's own steps, composed of the operations beside it: Ritz triplets of a product, an orthonormal basis, and
the next basis from the returned product, of a tracker by pairs and of one by halves.

On a device everything is a fixed number of launches for the whole list, and nothing is read back to the host. On the
CPU :mod:`.host` does the same matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import host
from .backend import allocate, live
from .backend import on_host as _on_host
from .blocks import column_dots, copy_blocks, first_column_residuals, grams, mixes
from .products import MAX_COLUMNS
from .small import eigenvectors, rotations
from .tables import capturing, remembered, upload
from .triplets import BasisLayout, Triplets, TurnLayout, orthonormalize_all, scouts


def sharpen(triplets: Triplets, count: int) -> None:
    """Makes the first ``count`` Ritz triplets exact ones of their span, in place.

    With ``X = U diag(θ)`` of so many columns and the eigenvectors R of ``XᵀX``: ``U θ ← X R``, ``V ← V R``, so that
    ``W v_i = θ_i u_i`` still, and U is orthonormal. On a device :func:`ritz_triplets` has the first vector alone
    sharply; on the CPU small ones come from squares in the weight's precision, and here from those in float64.
    """
    if _on_host(triplets.sigma):
        host.sharpen(triplets, count)
        return
    counts = [min(count, left.shape[1]) for left in triplets.lefts]
    lefts = [left[:, :r] for left, r in zip(triplets.lefts, counts, strict=True)]
    rights = [right[:, :r] for right, r in zip(triplets.rights, counts, strict=True)]
    width = max(counts)
    sigma = triplets.sigma[:, :width]
    top = torch.where(sigma[:, :1] > 0, sigma[:, :1], 1.0)
    relative = sigma / top
    gram, scale = grams(lefts, width=width)
    gram = gram * scale[:, None, None].square() * relative[:, :, None] * relative[:, None, :]
    rotation = eigenvectors(torch.nan_to_num(0.5 * (gram + gram.mT), 0.0, 0.0, 0.0))
    turned = [*allocate([(x.shape[0], x.shape[1]) for x in [*lefts, *rights]], sigma)]
    mixes([([*lefts, *rights], torch.cat([relative[:, :, None] * rotation, rotation]))], turned)
    images = turned[: len(lefts)]
    norms = column_dots(images, images, torch.ones_like(scale)).sqrt()
    inverse = torch.diag_embed(torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0))
    eye = torch.eye(width, dtype=norms.dtype, device=norms.device).expand_as(inverse)
    mixes([(turned, torch.cat([inverse, eye]))], [*lefts, *rights])
    sigma.copy_(norms * top + 0.0 * sigma[:, :1])  # what is not finite stays so


VARIANTS, SHIFT = 64, 37
_noise: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def start_block(rows: int, columns: int, dtype: torch.dtype, device: torch.device, variant: int = 0) -> Tensor:
    """A fixed Gaussian block (rows, columns): the same on every rank, run and machine, without a touch of the global
    random state. A view into one buffer (rows of the largest matrix, 64) per device and dtype; another ``variant`` is
    one of 64 windows of it, further down."""
    offset = SHIFT * (variant % VARIANTS)
    return noise_buffer(rows, dtype, device)[offset : offset + rows, :columns]


def noise_buffer(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The buffer of :func:`start_block`, long enough for every window of so many rows."""
    needed = rows + SHIFT * (VARIANTS - 1)
    noise = _noise.get((dtype, device))
    if noise is None or len(noise) < needed:
        # numpy's stream is the same bits on every machine; torch's depends on the vector width of the CPU
        generator = np.random.Generator(np.random.PCG64(0x5EED))
        values = torch.from_numpy(generator.standard_normal((1 << (needed - 1).bit_length(), MAX_COLUMNS)))
        noise = upload(values, dtype, device)
        if capturing(device):  # filled by the graph alone, when it is replayed
            return noise
        _noise[dtype, device] = noise
        if device.type != "cpu":  # once, as other streams would not wait for the copy
            torch.get_device_module(device).current_stream(device).synchronize()
    return noise


def ritz_triplets(
    products: Sequence[Tensor], blocks: Sequence[Tensor], *, out: Triplets | None = None, active: Tensor | None = None
) -> Triplets:
    """Rayleigh–Ritz on ``span(V)`` from ``Y = W V``, with V orthonormal.

    ``G = YᵀY`` gives the rotation Q (:func:`~specopt.kernels.small.rotations`); then ``θ_i = ‖Y q_i‖``,
    ``u_i = Y q_i / θ_i``, ``v_i = V q_i``, so that ``W v_i = θ_i u_i`` however old V is. A ``θ_i`` of which rounding
    leaves nothing, and one below the smallest normal number, whose inverse may be none, is 0, and so is its ``u_i``.

    Args:
        products: ``Y_b`` (m_b, k_b).
        blocks: ``V_b`` (n_b, k_b), orthonormal columns.
        out, active: where to write, and bool (B,) of which to write.
    """
    if out is None:
        out = Triplets(
            products[0].new_zeros(len(products), max(y.shape[1] for y in products)),
            allocate([(y.shape[0], y.shape[1]) for y in products], products[0]),
            allocate([(v.shape[0], v.shape[1]) for v in blocks], blocks[0]),
        )
        active = None
    if _on_host(products[0]):
        host.ritz_triplets(products, blocks, out, active)
        return out
    gram, scale = grams(products)
    rotation, weight = rotations(gram)
    root = weight.sqrt()
    limits = torch.finfo(root.dtype)
    present = (root > 64 * limits.eps * root[:, :1]) & (root * scale[:, None] >= limits.smallest_normal)
    inverse = torch.where(present, 1 / torch.where(present, root, 1.0), 0.0) / scale[:, None]
    # a non-finite product leaves no comparison true: let it show in sigma
    sigma = torch.where(present, root, 0.0) * scale[:, None] + 0.0 * gram.sum((1, 2))[:, None]
    both = None if active is None else torch.cat([active, active])
    factors = torch.cat([rotation * inverse[:, None, :], rotation])
    mixes([([*products, *blocks], factors)], [*out.lefts, *out.rights], active=both)
    out.sigma.copy_(sigma if active is None else torch.where(active[:, None], sigma, out.sigma))
    return out


def orthonormalize(
    candidates: Sequence[Tensor], starts: Sequence[Tensor], out: Sequence[Tensor], *, active: Tensor | None = None
) -> None:
    """An orthonormal basis of each block of candidate columns into ``out``: Cholesky-QR twice, earlier columns first.

    Columns that are zero or depend on those before them are replaced by columns of ``starts`` between the passes. A
    block with a non-finite entry leaves its ``out`` as it is.
    """
    if _on_host(out[0]):
        host.orthonormalize(candidates, starts, out, live(active, len(out)))
    else:
        orthonormalize_all(candidates, starts, out, active)


def next_basis(
    triplets: Triplets,
    returned: Sequence[Tensor],
    previous: Sequence[Tensor],
    starts: Sequence[Tensor],
    layout: BasisLayout,
    correction: Tensor,
    out: Sequence[Tensor],
    *,
    active: Tensor | None = None,
) -> Tensor:
    """The next ``V = orth[ images | kept | followers | scout ]`` from ``Z = Wᵀ U``, and the first triplet's residual.

    With ``d = sigma + correction``, sorted by ``|d|``: images ``Z_i d_i − ½ min(d²) v_i`` of the
    largest, kept ``Z_i d_i − d_i² v_i`` of the first few (beside its image each spans a Krylov pair), and followers
    ``(W − W_before)ᵀ Ω``: where the last update went, as the difference of two probes. The scout is a column of
    ``starts``.

    Args:
        triplets: of the matrices before the correction ``W ← W + Σ c_i u_i v_iᵀ``.
        returned: ``[Z_b | P_b]`` (n_b, k_b + a_b): ``Z = Wᵀ U`` and the probe ``P = Wᵀ Ω``, Ω fixed.
        previous: the probes (n_b, a_b) of the step before.
        starts: fixed random columns (n_b, k_b) for directions that vanish.
        layout: columns of each basis, how many of them kept and followers.
        correction: ``c`` (B, r) of the first r triplets, r <= K.
        out: the bases (n_b, k_b), written where ``active`` and finite.

    Returns:
        residual (B,): ``‖Wᵀu₁ − d₁ v₁‖ / θ₁``, the same before and after the correction.
    """
    sigma = triplets.sigma
    width = sigma.shape[1]
    top = torch.where(sigma[:, 0] > 0, sigma[:, 0], torch.ones_like(sigma[:, 0]))
    rank = correction.shape[1]
    # a correction may raise a sigma by any factor
    largest = top.maximum((sigma[:, :rank] + correction).abs().amax(1))
    corrected = sigma / largest[:, None]
    corrected[:, :rank] += correction / largest[:, None]
    if _on_host(sigma):
        return host.next_basis(triplets, returned, previous, starts, layout, top, largest, corrected, out, active)
    plan = _plan(layout, width, sigma.device, sigma.dtype)
    square = corrected.square()
    shift = 0.5 * torch.where(plan.real, square, torch.inf).amin(1, keepdim=True)
    order = torch.where(plan.real, corrected.abs(), -1.0).argsort(dim=1, descending=True, stable=True)
    source = order.gather(1, plan.rank)
    d = corrected.gather(1, source)
    places = torch.arange(width, device=sigma.device)
    onehot = (places[:, None] == source[:, None, :]).to(sigma.dtype) * plan.taken[:, None, :]  # (B, from, to)
    probes = max(layout.followers)
    from_z = sigma.new_zeros(len(returned), width + probes, width)
    from_z[:, :width] = onehot * (d / largest[:, None])[:, None, :]
    from_z = from_z + plan.follow_now / largest[:, None, None]
    from_v = -onehot * torch.where(plan.image, shift, d.square())[:, None, :]
    terms: list[tuple[Sequence[Tensor], Tensor]] = [(returned, from_z), (triplets.rights, from_v)]
    if probes:
        terms.append((previous, -plan.follow_before / largest[:, None, None]))
    candidates = allocate([(basis.shape[0], basis.shape[1]) for basis in out], out[0])
    mixes(terms, candidates)
    orthonormalize(candidates, starts, out, active=active)
    return first_column_residuals(returned, triplets.rights, top)


def leading_residuals(returned: Sequence[Tensor], triplets: Triplets, count: int) -> tuple[Tensor, Tensor]:
    """``‖Z_i − (Z_i·v_i) v_i‖ / θ₁``: of the first triplet (B,), and the largest of the first ``count`` (B,).

    Args:
        returned: ``Z = Wᵀ U`` (n_b, >= k_b).
        triplets: those U belongs to.
    """
    top = triplets.sigma[:, 0]
    scale = torch.where(top > 0, top, 1.0)
    first = first_column_residuals(returned, triplets.rights, scale)
    if count == 1:
        return first, first
    counts = [min(count, right.shape[1]) for right in triplets.rights]
    images = [z[:, :r] for z, r in zip(returned, counts, strict=True)]
    rights = [v[:, :r] for v, r in zip(triplets.rights, counts, strict=True)]
    rest = allocate([(v.shape[0], v.shape[1]) for v in rights], scale)
    along = torch.diag_embed(column_dots(images, rights, scale))
    eye = torch.eye(along.shape[1], dtype=scale.dtype, device=scale.device) / scale[:, None, None]
    mixes([(images, eye), (rights, -along)], rest)
    return first, column_dots(rest, rest, torch.ones_like(scale)).amax(1).sqrt().maximum(first)


class _Plan(NamedTuple):
    rank: Tensor  # (B, K) which place in the order a column of the basis takes its direction from
    real: Tensor  # (B, K) columns that exist
    image: Tensor
    taken: Tensor  # images and kept, as 0 and 1
    follow_now: Tensor  # (B, K + a, K) one-hot from the probes of this step to the followers
    follow_before: Tensor  # (B, a, K) the same from the probes of the step before


def _plan(layout: BasisLayout, width: int, device: torch.device, dtype: torch.dtype) -> _Plan:
    return remembered(("basis", layout, width, dtype), device, lambda: _new_plan(layout, width, device, dtype))


def _new_plan(layout: BasisLayout, width: int, device: torch.device, dtype: torch.dtype) -> _Plan:
    count, probes = len(layout.columns), max(layout.followers)
    rank = np.zeros((count, width), np.int64)
    real, image, taken = (np.zeros((count, width), np.bool_) for _ in range(3))
    now, before = np.zeros((count, width + probes, width)), np.zeros((count, probes, width))
    for b, (k, r, a) in enumerate(zip(*layout, strict=True)):
        p = k - r - a - scouts(k)
        rank[b, :p], rank[b, p : p + r] = np.arange(p), np.arange(r)
        real[b, :k], image[b, :p], taken[b, : p + r] = True, True, True
        for f in range(a):
            now[b, k + f, p + r + f] = before[b, f, p + r + f] = 1
    return _Plan(
        upload(rank, torch.long, device),
        *(upload(mask, torch.bool, device) for mask in (real, image)),
        *(upload(values, dtype, device) for values in (taken, now, before)),
    )


def turn(
    products: Sequence[Tensor],
    bases: Sequence[Tensor],
    others: Sequence[Tensor],
    starts: Sequence[Tensor],
    layout: TurnLayout,
    *,
    active: Tensor | None = None,
) -> tuple[Triplets, Tensor, Tensor]:
    """What follows a half product ``[Y | P] = W [V | Ω]`` of a tracker by halves.

    The Ritz triplets; V turned to their right vectors; and as U, for the next half product, the orthonormal basis of
    ``[ images | W v_i − (u_i · W v_i) u_i | (W − W_before) Ω ]``, in units of sigma₁, where ``u_i`` and ``v_i`` are
    pairs of columns of U and V as they were.

    Args:
        products: ``[Y_b | P_b]`` (m_b, k_b + a_b).
        bases: (n_b, >= k_b), of which the first columns are V.
        others: ``[U_b | P_b of the turn before]`` (m_b, k_b + a_b).
        starts: random columns (m_b, k_b) for directions that vanish.
        layout: columns of each basis, how many of them kept and followers.
        active: bool (B,); bases where it is False, or a product not finite, stay as they are.

    Returns:
        The triplets, with lefts at least one column wide; the residual (B,) that the product shows of the first
        columns of U and V, ``‖W v₁ − (u₁ · W v₁) u₁‖ / sigma₁``; and where bases were moved on (B,).
    """
    if _on_host(products[0]):
        return host.turn(products, bases, others, starts, layout, active)
    blocks = [[x[:, :k] for x, k in zip(xs, layout.columns, strict=True)] for xs in (products, bases, others)]
    triplets = ritz_triplets(blocks[0], blocks[1])
    sigma = triplets.sigma[:, 0]
    scale = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    residual = first_column_residuals(blocks[0], blocks[2], scale)
    valid = sigma.isfinite() if active is None else active & sigma.isfinite()
    plan = remembered(("turn", layout, scale.dtype), scale.device, lambda: _new_turn(layout, scale.dtype, scale.device))
    width = triplets.sigma.shape[1]
    followers = plan.followers / scale[:, None, None]
    from_products, from_others = followers.clone(), followers.clone()
    from_products[:, :width] += plan.kept / scale[:, None, None]
    from_others[:, :width] += plan.kept * column_dots(blocks[0], blocks[2], scale)[:, :, None]
    candidates = allocate([(left.shape[0], left.shape[1]) for left in triplets.lefts], products[0])
    mixes([(triplets.lefts, plan.images), (products, from_products), (others, -from_others)], candidates)
    orthonormalize(candidates, starts, blocks[2], active=valid)
    copy_blocks(triplets.rights, blocks[1], active=valid)
    return triplets, residual, valid


class _Turn(NamedTuple):
    """One-hot matrices (B, from, to) that pick the columns of the next basis."""

    images: Tensor
    kept: Tensor
    followers: Tensor  # from the probe's columns


def _new_turn(layout: TurnLayout, dtype: torch.dtype, device: torch.device) -> _Turn:
    count, width, probe = len(layout.columns), max(layout.columns), max(layout.followers)
    images, kept = np.zeros((count, width, width)), np.zeros((count, width, width))
    followers = np.zeros((count, width + probe, width))
    for b, (k, r, a) in enumerate(zip(*layout, strict=True)):
        p = k - r - a
        images[b, :p, :p] = np.eye(p)
        kept[b, :r, p : p + r] = np.eye(r)
        followers[b, k : k + a, p + r : k] = np.eye(a)
    return _Turn(*(upload(t, dtype, device) for t in (images, kept, followers)))


__all__ = [
    "BasisLayout",
    "Triplets",
    "TurnLayout",
    "leading_residuals",
    "next_basis",
    "orthonormalize",
    "ritz_triplets",
    "start_block",
    "turn",
]
