"""Columns that stand in the path of an object, as Hive lays them out: ``day=2026-01-01/part-0.parquet``."""

from urllib.parse import unquote

# What Hive writes for a null.
NULL = "__HIVE_DEFAULT_PARTITION__"


def partition_values(uri: str) -> dict[str, str | None]:
    """Return the columns named in the folders of a URI, with their values as text; the innermost counts."""
    parts = (part.partition("=") for part in uri.split("/")[:-1])
    return {
        unquote(name): None if value == NULL else unquote(value)
        for name, equals, value in parts
        if name and equals
    }
