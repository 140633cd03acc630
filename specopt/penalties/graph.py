"""Logits, the inputs they were computed from, and the autograd graph between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .checking import check_differentiable, check_logits

Output = Tensor | Callable[[Tensor], Tensor]
"""Logits (B, C), or what computes them from inputs."""

INDEPENDENT = (
    "output does not depend on inputs by operations with a gradient: "
    "logits are to be computed from inputs.requires_grad_(), with gradients on and without detach()"
)


@dataclass(frozen=True)
class Graph:
    """What a gradient of logits by inputs passes through."""

    logits: Tensor
    """(B, C), of float32 or float64."""
    inputs: Tensor
    """(B, ...), which require grad."""

    def gradient(
        self, value: Tensor, cotangents: Tensor | None = None, *, differentiable: bool = True, retain: bool = True
    ) -> Tensor:
        """Of what was computed from the logits, by the inputs. The graph stays if it is to be retained.

        Raises:
            ValueError: the one does not depend on the other.
        """
        (found,) = torch.autograd.grad(
            value, self.inputs, cotangents, retain_graph=retain, create_graph=differentiable, allow_unused=True
        )
        if found is None:
            raise ValueError(INDEPENDENT)
        return found

    def derivatives(self, cotangents: Tensor) -> Tensor:
        """``z_k^T J(x_i)``, of shape (K, B, ...), for cotangents z (K, B, C): differentiable by all that logits and
        cotangents depend on. One backward pass, vectorized over k by torch.func.vmap: ``is_grads_batched`` of
        autograd.grad is an older one, which loops over k in convolutions, pooling and batch norm.

        Where vmap cannot, a backward pass for each k: of the same memory, K times the launches, and what vmap did until
        it failed. That is so for operations without a rule in torch, and for batch, instance and layer norm with
        weights of another dtype than their input, as under autocast: torch's rules multiply the gradient by the
        weight, which promotes it, and then call a kernel that takes gradient and input of one dtype only.

        Samples that depend on each other give ``Σ_j z_jk^T ∂g(x_j)/∂x_i``.
        """
        found = self._vectorized(cotangents) if len(cotangents) > 1 else None
        return torch.stack([self.gradient(self.logits, z) for z in cotangents]) if found is None else found

    def _vectorized(self, cotangents: Tensor) -> Tensor | None:
        """None where vmap fails. Torch has no one error for that; one with another reason comes again without vmap,
        except that of memory, which is not to be asked for twice."""
        # what a model that is itself checkpointed computes again is one mask for all k, that of its forward
        product = torch.func.vmap(lambda z: self.gradient(self.logits, z), randomness="same")
        try:
            found: Tensor = product(cotangents)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None
        return found

    def mean_square(self, gradients: Tensor) -> Tensor:
        """``1/B Σ_i`` of the squares of gradients (K, B, ...), in the logits' precision."""
        return gradients.to(self.logits.dtype).square().sum() / len(self.logits)


def graph_of(output: Output, inputs: Tensor) -> Graph:
    """Runs ``output`` on a copy of the inputs where it is a callable.

    Raises:
        RuntimeError: gradients are off, or torch.func's.
        TypeError: inputs or logits that are no tensors of floating point numbers.
        ValueError: inputs without a sample or from inference mode; logits that are not (B, C) or have no gradient.
    """
    check_differentiable(inputs, output)
    if not isinstance(output, Tensor):
        inputs = inputs.detach().requires_grad_()
        logits = logits_of(output, inputs.clone())  # which it may write to
    else:
        logits = logits_of(output, inputs)
    if not logits.requires_grad:
        raise ValueError(INDEPENDENT)
    return Graph(logits, inputs)


def logits_of(output: Tensor | Callable[[Any], Tensor], inputs: Any) -> Tensor:
    """In float32, or float64 where they are of that; what ``output`` gives for the inputs where it is a callable.

    Raises:
        TypeError, ValueError: no callable, or not logits (B, C) of floating point numbers.
    """
    if isinstance(output, Tensor):
        logits = output
    elif not callable(output):
        raise TypeError(f"output must be logits or a callable that computes them, got {type(output).__name__}")
    elif inputs is None:
        raise ValueError("inputs must be given where output is a callable")
    else:
        logits = output(inputs)
    check_logits(logits, inputs)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def nodes_of(graph: Graph) -> tuple[Node, ...]:
    """Nodes between the logits and the inputs, that of the inputs among them; none if these are not reached."""
    start, end = get_gradient_edge(graph.logits), get_gradient_edge(graph.inputs)
    target = end.node, end.output_nr  # a node may have outputs beside the inputs
    reaches: dict[Node, bool] = {}
    open_nodes: list[Node] = [start.node]
    while open_nodes:
        node = open_nodes[-1]
        edges = [(source, output) for source, output in node.next_functions if source is not None]
        unseen = [] if node in reaches else [source for source, _ in edges if source not in reaches]
        reaches[node] = not unseen and any(edge == target or reaches[edge[0]] for edge in edges)
        if unseen:
            open_nodes.extend(unseen)
        else:
            open_nodes.pop()
    found = [node for node, reached in reaches.items() if reached]
    return (*found, end.node) if found or (start.node, start.output_nr) == target else ()
