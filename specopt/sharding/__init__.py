"""Weights that are cut up over a device mesh: DTensors, as ``fully_shard`` and tensor parallelism make them.

What is where. A weight W (m, n) lies on R ranks, each with some of its rows, or of its columns, or (cut both ways) a
tile; a rank may have none of it. Block, probe and stats are on every rank. The base optimizer, torch's own, updates
every rank's part; products, corrections and penalties touch no more than that part either, and no rank ever has the
whole W.

What is sent. In ``Y = W V`` a rank that has whole rows makes its rows of Y without anybody's help. What all need of Y
is its Gram matrix ``YᵀY`` (k, k), the sum of the ranks' own: **now**, because the singular values and the correction
follow from it. In ``Z = Wᵀ U`` every rank has a term (n, k) of a sum. What Z gives is the next step's block, and the
residual that may call for a conditional pair in the next step: **late**, its sum is due by then and travels behind the
training's next forward. A weight that is cut by columns alone is read transposed, and is the same. All matrices of a
process group share one all-reduce of each kind in a step; a conditional pair, decided on every rank alike, adds one of
each::

    resume   (late sum of the last step) residual, next block
    pass     Y = W V, YᵀY                       local
    NOW      sum of YᵀY                         all-reduce, k² numbers a matrix
    small    σ, Q; u = Y q/σ, v = V q           on every rank alike
    pass     W += c u vᵀ; Z = Wᵀ [U | Ω]        local
    LATE     sum of Z                           all-reduce, n(k + a) numbers a matrix, behind what follows the step

SNR makes one product a step, from alternate sides. Where ranks have whole rows of the product, the Gram matrix of it
and of the block that it renews is summed, else the product itself. Both are due now, one in a step.
A matrix that is cut both ways, or whose short side is cut and so short that it is solved and not tracked, has its
product summed now, in the place of a Gram matrix. Frobenius scaling sums squares, one number a matrix.

What holds it together. Small dense parts are computed by every rank from the same bits, in float64 from the Gram matrix
on, so ranks agree without being told. That takes one kind of device and one build of torch in a process group, and the
same parameters with gradients on every rank. Ω and all other random columns are those of the whole matrix, a rank
taking its rows of them: sums do not depend on how many ranks there are, but by rounding. Decisions (another pair, a
column to be replaced) are read on the host.

A cap of all singular values (``rank="full"``) takes products of n × n matrices, which parts make no smaller: matrices
come whole to every rank, some at a time. So do convolutions as operators (``conv="operator"``): their kernels are
small, and their maps are no products of parts. Every rank has the whole kernel for the time of a step, by a sum of
parts amid zeros, follows it as if nothing was cut up, and writes its own part. Nothing that was measured decides what
is summed.

Sums go through process groups of our own, each of all the ranks that share a weight: a late one would hold up what
comes behind it in the weights' own.

Of a DTensor with nothing but replicas every rank makes the step of the whole matrix by itself.

``cut.py`` who holds what; ``views.py`` DTensors as matrices; ``exchange.py`` the packed sums; ``communicators.py`` whom
they go through; ``gathering.py`` parameters that every rank takes whole; ``unfinished.py`` what a step leaves behind;
``triplets.py`` from sums to triplets and bases; ``pairs.py`` and ``halves.py`` the two trackers; ``measuring.py`` first
triplets of weights as they are; ``whole.py`` caps of whole matrices; ``sessions.py`` what rules do with all that;
``checking.py`` what cannot be done.
"""
