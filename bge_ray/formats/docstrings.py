"""A real corpus that every machine with Python has: docstrings, for the demo, the bench and the tests."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_CHARS = 60
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo"}


STANDARD_LIBRARY, PACKAGES = "stdlib", "purelib"


def find_docstrings(*places: str) -> Iterator[tuple[str, str, str]]:
    """Yield (id, title, text) of what is documented in the standard library, then in the packages.

    Args:
        places: STANDARD_LIBRARY, PACKAGES, or none for both.
    """
    for place in places or (STANDARD_LIBRARY, PACKAGES):
        yield from _find_below(Path(sysconfig.get_path(place)))


def known_items(*places: str) -> Iterator[tuple[str, str]]:
    """Yield (first sentence, rest) of the docstrings, each in one line: a query, and the passage it is of.

    Args:
        places: as of `find_docstrings`.
    """
    for _, query, passage in known_items_of(*places):
        yield query, passage


def known_items_of(*places: str) -> Iterator[tuple[str, str, str]]:
    """Yield the same with the module at the top, or the package, before each."""
    for name, _, text in find_docstrings(*places):
        first, _, rest = " ".join(text.split()).partition(". ")
        yield name.partition(".")[0], first, rest


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
