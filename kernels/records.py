"""The record of a matrix: what the fused kernels are told of it, in rows of tables on the device.

``table`` (B, FIELDS) int64: addresses, sizes and strides, uploaded when one of them moved. ``numbers`` (B, NUMBERS)
float32: options of this step, uploaded when one of them changed. ``scalars`` (B, SCALARS) float32: what kernels leave
for one another within a step. Every index is a compile-time constant: a kernel reads ``table + b * FIELDS + WEIGHT``.

"Left" arrays have a row for each row of the matrix as the tracker reads it, "right" ones a row for each of its columns.
A "turn" is on side 0, ``W [V | Ω]`` into the left product, or on side 1, ``Wᵀ [U | Ω]`` into the right one. All blocks
are float32 with unit column stride.
"""

from __future__ import annotations

import triton.language as tl

# --- table ---------------------------------------------------------------------------------------------------------
WEIGHT = tl.constexpr(0)
"""Address, then rows, columns and their strides. Columns are the side of unit stride, where there is one: then a
matrix that lies in memory by columns is kept here transposed, and ``SWAPPED`` is 1."""
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)
ROW_STEP = tl.constexpr(3)
COLUMN_STEP = tl.constexpr(4)
SWAPPED = tl.constexpr(5)
"""1: rows here are the tracker's columns (the right side)."""
ALIGNED = tl.constexpr(6)
"""1: unit column stride, and every address, the row stride and the row length are multiples of 16 bytes."""
GRAD = tl.constexpr(7)
"""Address of the gradient; it, and the base optimizer's state after it, lie in memory as the weight does. 0: none."""
FIRST = tl.constexpr(8)
"""SGD's momentum buffer, AdamW's exp_avg."""
SECOND = tl.constexpr(9)
"""AdamW's exp_avg_sq."""
PEAK = tl.constexpr(10)
"""AdamW's max_exp_avg_sq."""
LR = tl.constexpr(11)
"""Address of a float32 on the device that overrides ``RATE``; 0: none."""
STEP = tl.constexpr(12)
"""Address of AdamW's float32 step count on the device, counted up by kernels; 0: bias corrections in ``numbers``."""
TARGET_AT = tl.constexpr(13)
"""Address of a float32 that overrides ``TARGET``; 0: none."""
K = tl.constexpr(14)
"""Columns of the tracked basis; of an exact matrix its own columns, and there is no basis."""
PROBES = tl.constexpr(15)
EXACT = tl.constexpr(16)
"""1: at most 64 columns, solved exactly from the matrix itself."""
RIGHT = tl.constexpr(17)
"""Address and row stride: the basis V (n, k), state."""
RIGHT_STEP = tl.constexpr(18)
LEFT = tl.constexpr(19)
"""The basis U (m, k): state of a tracker by halves, scratch of one by pairs (``[U]``, of the Ritz triplets)."""
LEFT_STEP = tl.constexpr(20)
RIGHT_PROBE = tl.constexpr(21)
"""The probe WᵀΩ (n, a) of the step before, state; and its row stride."""
RIGHT_PROBE_STEP = tl.constexpr(22)
LEFT_PROBE = tl.constexpr(23)
"""WΩ (m, a), state of a tracker by halves; 0: none."""
LEFT_PROBE_STEP = tl.constexpr(24)
LEFT_PRODUCT = tl.constexpr(25)
"""Scratch: ``W [V | Ω]`` in ``LEFT_CHUNKS`` partial sums, (chunks, m, KP)."""
LEFT_CHUNKS = tl.constexpr(26)
LEFT_CHUNK = tl.constexpr(27)
"""Columns (of the tracker's n) that go into one partial sum."""
RIGHT_PRODUCT = tl.constexpr(28)
"""Scratch: ``Wᵀ [U | Ω]``, (chunks, n, KP)."""
RIGHT_CHUNKS = tl.constexpr(29)
RIGHT_CHUNK = tl.constexpr(30)
LEFT_SUM = tl.constexpr(31)
"""Scratch (m, KP): the sum of the partial sums."""
RIGHT_SUM = tl.constexpr(32)
LEFT_VECTORS = tl.constexpr(33)
"""Scratch (m, KP): left vectors of the Ritz triplets, u₁ first."""
RIGHT_VECTORS = tl.constexpr(34)
LEFT_SPARE = tl.constexpr(35)
"""Scratch (m, KP): candidates of the next basis."""
RIGHT_SPARE = tl.constexpr(36)
STATS = tl.constexpr(37)
"""Address of the state's stats, in the order of ``specopt.tracker.common.Stat``."""
PARTIALS = tl.constexpr(38)
"""Scratch: what the strips of a block leave for the sum over all of them, KP (KP + 2) each."""
FIELDS = tl.constexpr(39)

# --- numbers -------------------------------------------------------------------------------------------------------
RATE = tl.constexpr(0)
BETA1 = tl.constexpr(1)
"""AdamW; SGD: momentum."""
BETA2 = tl.constexpr(2)
"""AdamW; SGD: dampening."""
EPS = tl.constexpr(3)
DECAY = tl.constexpr(4)
BIAS1 = tl.constexpr(5)
"""``1 − β₁ᵗ``; SGD: 1 where the momentum buffer is new and takes the gradient as it is."""
BIAS2_ROOT = tl.constexpr(6)
"""``sqrt(1 − β₂ᵗ)``; SGD: 1 with Nesterov."""
MAXIMIZE = tl.constexpr(7)
STRENGTH = tl.constexpr(8)
"""λ of the penalty, negative under ``maximize``; λ of the decay."""
TOLERANCE = tl.constexpr(9)
"""Already multiplied by COLD_STOP in a cold step."""
MINIMUM = tl.constexpr(10)
"""Pairs of products in this step; 1 in a warm one."""
MAXIMUM = tl.constexpr(11)
COLD = tl.constexpr(12)
FIXED = tl.constexpr(13)
"""1: ``max_passes`` is set, so a lost block does not raise ``MAXIMUM``."""
TARGET = tl.constexpr(14)
MODE = tl.constexpr(15)
"""0 set, 1 cap, 2 rescale, 3 decay."""
RAISE_SMALL = tl.constexpr(16)
SEED = tl.constexpr(17)
"""Of stochastic rounding: another number in every step; 0 without it."""
COMPLEMENT1 = tl.constexpr(18)
"""``1 − β₁``, rounded from double: from a float32 β it could not be told to better than 1e-5."""
COMPLEMENT2 = tl.constexpr(19)
"""``1 − β₂``; SGD: 1 − dampening."""
NUMBERS = tl.constexpr(20)

# --- scalars -------------------------------------------------------------------------------------------------------
SIGMA = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)
PAIRS = tl.constexpr(2)
WANTED = tl.constexpr(3)
"""1 where a further pair of products is called for."""
CHANGE = tl.constexpr(4)
"""``c`` of the correction ``W ← f W + c u₁v₁ᵀ``."""
FACTOR = tl.constexpr(5)
PENALTY = tl.constexpr(6)
"""``λ σ₁``, 0 where the triplet is not finite."""
STILL_CAPPED = tl.constexpr(7)
SEEN = tl.constexpr(8)
"""Tracker by halves: 1 where the step's second half was finite, so that its probe is kept as well."""
SCALARS = tl.constexpr(9)

# --- stats: the order of specopt.tracker.common.Stat ---------------------------------------------------------------
STAT_SIGMA = tl.constexpr(0)
STAT_RESIDUAL = tl.constexpr(1)
STAT_TOP = tl.constexpr(2)
STAT_VALID = tl.constexpr(3)
STAT_CAPPED = tl.constexpr(4)
STAT_PAIRS = tl.constexpr(5)
STAT_COUNT = tl.constexpr(6)
"""Steps made, as ``spectral_step`` on the host; what the device goes by, which a replayed graph moves on."""
