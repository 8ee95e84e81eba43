"""A real corpus that every machine with Python has: docstrings, for the demo, the bench and the tests."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_CHARS = 60
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo"}


def find_docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield (id, title, text) of what is documented in the standard library, then in the packages."""
    for folder in ("stdlib", "purelib"):
        yield from _find_below(Path(sysconfig.get_path(folder)))


def _find_below(root: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS & set(parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a file for another Python; the demo wants docstrings, not every file
        yield from _documented(tree, module)


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_CHARS:
            yield name, name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(
            child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and not child.name.startswith("_"):
            yield from _documented(child, f"{name}.{child.name}")
