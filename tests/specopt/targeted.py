"""What tests of targets share."""

from __future__ import annotations

from typing import Any


def entries(optimizer: Any) -> dict[str, Any]:
    """What the groups hold for each parameter."""
    found: dict[str, Any] = {}
    for group in optimizer.param_groups:
        each = group["target"] if isinstance(group["target"], list) else [group["target"]] * len(group["params"])
        names = group.get("param_names") or [str(place) for place in range(len(each))]
        found.update(zip(names, each, strict=True))
    return found
