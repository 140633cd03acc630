"""What a rule is told of a call, and how it says that it does not know."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .layers import Norms


class NotKnown(Exception):
    """No Lipschitz constant, and why: as a sentence that goes on from the name of what was called."""


@dataclass(frozen=True)
class Call:
    """One call of a module with one input."""

    norms: Norms
    training: bool
    input: Tensor | None
    """An example; None where no inputs were given."""
    output: Tensor | None

    def example(self, what: str = "sizes are") -> Tensor:
        """
        Raises:
            NotKnown: without inputs.
        """
        if self.input is None:
            raise NotKnown(f"{what} not known; give inputs=")
        return self.input
