"""What is minimized: the mean cross entropy, that of adversarial training, or with a penalty beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specopt import penalties

if TYPE_CHECKING:
    from .methods import Method

ADVERSARIAL_SHARE = 0.5
"""alpha: the weight of the clean loss beside that of the perturbed inputs."""
BUDGET = 2**31
"""Bytes that the gradients of all classes may take, for each network."""
PUBLISHED_EPS = 1e-6
"""Inside the logarithm of the published confidence penalty."""


@dataclass(frozen=True)
class Batch:
    """Of one network, or of several networks that are trained at once, one batch after the other."""

    images: Tensor
    labels: Tensor
    networks: int = 1
    projection: Tensor | None = None
    """SpectReg's z: ``(classes,)``, or ``(len(images), classes)`` where each network has its own; drawn where None."""

    @property
    def size(self) -> int:
        """Of one network's batch."""
        return len(self.images) // self.networks


PENALTIES: dict[str, Callable[[Tensor, Tensor, Batch], Tensor]] = {
    "double-back": lambda logits, images, batch: penalties.double_backprop(logits, images, batch.labels),
    "spect-reg": lambda logits, images, batch: penalties.spect_reg(logits, images, z=batch.projection),
    "frob-reg": lambda logits, images, batch: penalties.frob_reg(logits, images, max_bytes=batch.networks * BUDGET),
    "jac-reg": lambda logits, images, batch: penalties.jac_reg(logits, images, max_bytes=batch.networks * BUDGET),
    # the published one is a sum over the batch, and all here are means
    "confidence-penalty": lambda logits, images, batch: (
        batch.size * penalties.confidence_penalty(logits, images, eps=PUBLISHED_EPS)
    ),
}
"""By name, of logits and the images that they were made from."""
DERIVATIVES = ("double-back", "spect-reg", "frob-reg", "jac-reg")
"""Those whose gradient is a second derivative."""


@dataclass(frozen=True)
class Objective:
    """Of a method, for one network or for several.

    The loss is the mean cross entropy, to which ``lambda P`` is added where the method has a penalty P. That of
    adversarial training, with ``g`` the gradient of the clean loss by ``x``, is
    ``alpha L(x) + (1 - alpha) L(x + epsilon g / ||g||_2)``, image by image, the step taken as a constant.
    There the backward of ``alpha L(x)`` gives g as well, and ends before the second forward: the graphs of the two are
    never held together. Dropout has the same masks in both.

    Args:
        weights: which get gradients.
        autocast: makes the context of each forward.
    """

    method: Method
    model: Callable[[Tensor], Any]
    weights: Sequence[Tensor]
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def fill_gradients(self, batch: Batch) -> None:
        """Adds those of the loss to the gradients of the weights; of several networks, each one's own loss."""
        if self.method.adversarial:
            self._adversarial(batch)
            return
        images = batch.images.detach().requires_grad_(bool(self.method.penalty))
        with self.autocast():
            logits = self.model(images)
            loss = F.cross_entropy(logits, batch.labels)
        if self.method.penalty:
            loss = loss + self.method.penalty_weight * PENALTIES[self.method.penalty](logits, images, batch)
        torch.autograd.backward(batch.networks * loss, inputs=self.weights)

    def _adversarial(self, batch: Batch) -> None:
        images = batch.images.detach().requires_grad_()
        with torch.random.fork_rng([images.device] if images.is_cuda else []):  # dropout draws the same masks twice
            self._backward(images, batch, ADVERSARIAL_SHARE, [*self.weights, images])
        assert images.grad is not None
        moved = images.detach() + penalties.fgm_step(images.grad, self.method.adversarial)
        self._backward(moved, batch, 1 - ADVERSARIAL_SHARE, self.weights)

    def _backward(self, images: Tensor, batch: Batch, share: float, inputs: Sequence[Tensor]) -> None:
        with self.autocast():
            loss = F.cross_entropy(self.model(images), batch.labels)
        torch.autograd.backward(batch.networks * share * loss, inputs=inputs)
