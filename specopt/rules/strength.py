"""What rules of one strength have in common."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import options
from ..tracker import device
from ..views import Matrix


@dataclass(frozen=True, repr=False)
class Strengthened(options.Shared):
    """A rule that is as strong as a number λ >= 0 says, 0 for not at all, and acts in every step."""

    lam: float
    strength: ClassVar[str]
    """λ's name in a group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.check_lambda("lam", self.lam)
        self.check(self.options)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.strength, *options.SHARED)

    def check(self, group: Mapping[str, Any]) -> None:
        options.check_shared(group)
        options.check_lambda(self.strength, group[self.strength])

    def is_on(self, group: Mapping[str, Any]) -> bool:
        return bool(group[self.strength] != 0)

    def period(self, group: Mapping[str, Any]) -> int:
        return 1

    def is_fused(self, matrix: Matrix) -> bool:
        return device.runs_on(matrix)

    def sort(self, matrix: Matrix) -> Hashable:
        return None
