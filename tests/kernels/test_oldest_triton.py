"""What the oldest Triton that pyproject.toml allows cannot do, and a newer one, with which tests run, can."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def jitted() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield f"{path.relative_to(KERNELS)}::{node.name}", node


FUNCTIONS = dict(jitted())


def test_there_are_functions_to_look_at() -> None:
    assert len(FUNCTIONS) > 50


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_calls_itself(name: str) -> None:
    """Triton 3.4 hashes it without end."""
    function = FUNCTIONS[name]
    called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    assert function.name not in called


@pytest.mark.parametrize("name", FUNCTIONS)
def test_constants_stand_left_of_the_types_that_they_are_compared_with(name: str) -> None:
    """In Triton 3.4 no type is equal to a constant that holds it."""
    compared = [node for node in ast.walk(FUNCTIONS[name]) if isinstance(node, ast.Compare)]
    assert not [text for text in map(ast.unparse, compared) if text.startswith("tl.") and "(" not in text.split("=")[0]]
