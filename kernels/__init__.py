"""Operations on lists of matrices, each as a torch reference and as Triton kernels with one signature.

Nothing here knows of optimizers; everything is importable without Triton. Which implementation runs is chosen per
device (:func:`backend_for`).
"""

from .backend import Backend, accumulation_dtype, allocate, backend_for, full_precision, has_triton, on_host
from .blocks import column_dots, copy_blocks, first_column_residuals, grams, mixes
from .newton_schulz import cap_
from .passes import Penalty, Update, base_updates_, corrections_
from .products import MAX_COLUMNS, skinny_products
from .small import MAX_EIGEN, eigenvectors, orthonormalizers, rotations
from .subspace import (
    leading_residuals,
    next_basis,
    orthonormalize,
    ritz_triplets,
    sharpen,
    start_block,
    turn,
)
from .tables import constant, identity, remembered, upload
from .triplets import BasisLayout, Triplets, TurnLayout
from .updates import MAX_RANK, frobenius_norms, rank_updates_, scale_

__all__ = [
    "MAX_COLUMNS",
    "MAX_EIGEN",
    "MAX_RANK",
    "Backend",
    "BasisLayout",
    "Penalty",
    "Triplets",
    "TurnLayout",
    "Update",
    "accumulation_dtype",
    "allocate",
    "backend_for",
    "base_updates_",
    "cap_",
    "column_dots",
    "constant",
    "copy_blocks",
    "corrections_",
    "eigenvectors",
    "first_column_residuals",
    "frobenius_norms",
    "full_precision",
    "grams",
    "has_triton",
    "identity",
    "leading_residuals",
    "mixes",
    "next_basis",
    "on_host",
    "orthonormalize",
    "orthonormalizers",
    "rank_updates_",
    "remembered",
    "ritz_triplets",
    "rotations",
    "scale_",
    "sharpen",
    "skinny_products",
    "start_block",
    "turn",
    "upload",
]
