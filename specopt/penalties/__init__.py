"""Penalties in the loss, to set beside control in the step: regularizers of what a network's output does when its
input moves, of its confidence, and adversarial training.

With ``g(x_i)`` the logits of sample i of a batch of B, ``f = softmax(g)``, and ``J`` their Jacobians by ``x_i``:

======================  ==========================================================================================
function                value (unweighted: the caller multiplies by lambda)
======================  ==========================================================================================
double_backprop         ``1/B Σ_i ‖∂l_i/∂x_i‖₂²``, ``l_i`` the loss of sample i
frob_reg                ``1/B Σ_i ‖J_g(x_i)‖_F²``, exact
jac_reg                 ``1/B Σ_i ‖J_f(x_i)‖_F²``, exact
spect_reg               ``1/B Σ_i ‖zᵀ J_g(x_i)‖₂²``, z random: an estimate of frob_reg by one backward pass
confidence_penalty      ``1/B Σ_i Σ_c p_c log p_c``, minus the mean entropy
adversarial             ``1/B Σ_i L(x_i + η_i)``, ``η_i`` a step of length epsilon up the loss
======================  ==========================================================================================

Common to all: ``output`` is either the logits (B, C), computed from ``inputs`` that require grad, or a callable, such
as a module, which is called once with a copy of ``inputs`` that does; the caller's tensor is left as it is, and no
gradient flows to it. (``confidence_penalty`` takes no gradient by the inputs, and calls with them as they are.) Each
may be called with ``(output, inputs, targets)``, which those that need none do not look at (``adversarial`` takes the
model, and ``epsilon`` beside it). Penalties are scalars of float32 (float64 from float64 logits) that can be
differentiated twice. The model's forward runs under the caller's autocast; softmax, norms and squares are made in
float32 and without it. Class indices are those of the logits: no target is ignored, -100 neither.

Batch norm in training mode makes every sample's output depend on the whole batch. What is taken then is the gradient
by ``x_i`` of the sum of the batch's outputs (losses); in eval mode that is the sample's own. Dropout: there is one
forward, and so one mask, which the derivative is of.

Under float16 with a GradScaler the penalty belongs into the loss that is scaled, ``scaler.scale(loss + lam *
penalty).backward()``, and is made from the loss before scaling. Its inner gradient runs through the model in float16
as it is: entries below 6e-8 vanish, and ones above 65504 become infinite, which the scaler sees and skips the step.
bfloat16 has the range of float32, and neither happens.
"""

from .confidence import confidence_penalty
from .fgm import adversarial, fgm_step
from .gradients import cross_entropy, double_backprop, spect_reg
from .jacobians import frob_reg, jac_reg

__all__ = [
    "adversarial",
    "confidence_penalty",
    "cross_entropy",
    "double_backprop",
    "fgm_step",
    "frob_reg",
    "jac_reg",
    "spect_reg",
]
