"""serve imports runtime and itself, and nothing below imports serve."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "diffpress"
ALLOWED = ("diffpress.runtime", "diffpress.serve")


def imported(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("diffpress")}


def test_serve_imports_runtime_alone() -> None:
    files = [*(PACKAGE / "serve").rglob("*.py")]
    assert len(files) > 15
    foreign = {name for path in files for name in imported(path) if not name.startswith(ALLOWED)}
    assert foreign == set()


def test_no_other_package_but_cli_imports_serve() -> None:
    files = [path for room in ("runtime", "compress", "export") for path in (PACKAGE / room).rglob("*.py")]
    assert len(files) > 100
    assert [path for path in files if any(name.startswith("diffpress.serve") for name in imported(path))] == []
