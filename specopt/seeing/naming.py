"""Names of matrices for people: told apart, and cut to a width without becoming alike."""

from __future__ import annotations

from collections.abc import Sequence

ELLIPSIS = "…"


def distinct(names: Sequence[str]) -> list[str]:
    """The names, the second and later of equal ones with a count behind: ``weight``, ``weight (2)``."""
    found: dict[str, None] = {}
    for name in names:
        candidate, count = name, 1
        while candidate in found:
            count += 1
            candidate = f"{name} ({count})"
        found[candidate] = None
    return list(found)


def shortened(names: Sequence[str], width: int) -> list[str]:
    """The names in at most ``width`` characters, those that differ still differing.

    Long ones are cut in the middle, all at the same place; where that would make two alike, what stands between the
    dots is abbreviated to first letters from the left (``m.e.layers.11.out_proj.weight``); and as a last resort a
    number is put behind.
    """
    if width < 8:
        raise ValueError(f"width must be 8 or more, got {width}")
    if all(len(name) <= width for name in names):
        return list(names)
    different = len(set(names))
    heads = sorted(range(1, width - 1), key=lambda head: abs(head - width // 3))
    for head in heads:
        cut = [_cut(name, width, head) for name in names]
        if len(set(cut)) == different:
            return cut
    initials = [_cut(_initials(name, width), width, width // 3) for name in names]
    if len(set(initials)) == different:
        return initials
    number = {name: f"#{i}" for i, name in enumerate(dict.fromkeys(names))}
    return [_cut(name, width - len(number[name]), 1) + number[name] for name in names]


def _cut(name: str, width: int, head: int) -> str:
    if len(name) <= width:
        return name
    tail = width - head - 1
    return name[:head] + ELLIPSIS + name[len(name) - tail :]


def _initials(name: str, width: int) -> str:
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        if not part.isdigit():
            parts[i] = part[:1]
    return ".".join(parts)
