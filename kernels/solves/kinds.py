"""What a solve follows."""

import triton.language as tl

RITZ = tl.constexpr(1)
"""After ``W V``: triplets, and what the step does with them."""
BASIS = tl.constexpr(2)
"""After ``Wᵀ [U | Ω]``: the next basis, and at the step's end its stats."""
TURN = tl.constexpr(3)
"""After one half product of a tracker by halves: both."""
