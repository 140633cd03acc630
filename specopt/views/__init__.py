"""Matrix views: how a parameter is read as matrices, and which bare tensors are read as one at all."""

from .matrix import (
    SCALING,
    Matrix,
    block_of,
    check_readable,
    could_be_controlled,
    is_controlled,
    matrices_of,
    matrix_view,
    refresh_copies,
    scaling,
    with_options,
    written_back,
)

__all__ = [
    "SCALING",
    "Matrix",
    "block_of",
    "check_readable",
    "could_be_controlled",
    "is_controlled",
    "matrices_of",
    "matrix_view",
    "refresh_copies",
    "scaling",
    "with_options",
    "written_back",
]
