"""The structure of the repository: what may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_a_tool_needs_the_tests() -> None:
    files = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "eaopd_megatron").rglob("*.py")]
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(ast.parse(file.read_text()))
        if name.partition(".")[0] == "tests"
    ]
    assert not wrong, "\n".join(wrong)
