"""What is installed is what is here: commands that resolve, and every file beside the Python ones."""

import importlib
import tomllib
from pathlib import Path

from tests.support.runs import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_every_command_is_a_function_that_is_there() -> None:
    scripts = PROJECT["project"]["scripts"]
    assert "bge-ray" in scripts
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_every_file_of_the_package_is_packed() -> None:
    """Setuptools packs modules by itself, in folders that are packages, and data only where it is told."""
    packed: set[Path] = set()
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            found = set((REPOSITORY / package.replace(".", "/")).glob(pattern))
            assert found, f"{package}: {pattern}"
            packed |= found
    files = [path for path in (REPOSITORY / "bge_ray").rglob("*") if path.is_file()]
    here = {path for path in files if "__pycache__" not in path.parts and not path.name.startswith(".")}
    assert {path for path in here if path.suffix != ".py"} == packed
    assert all((path.parent / "__init__.py").exists() for path in here)
