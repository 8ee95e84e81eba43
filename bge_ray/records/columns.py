"""The corpus columns of a data set, and Arrow types in a form that JSON can carry."""

import base64
from dataclasses import dataclass, field

import pyarrow as pa


@dataclass(frozen=True)
class ColumnType:
    """An Arrow type: ``name`` for people, ``ipc`` (base64 of a schema message) to rebuild it exactly."""

    name: str
    ipc: str = field(repr=False)

    @staticmethod
    def of(kind: pa.DataType, note: str = "") -> "ColumnType":
        """Write a type down; a ``note`` stands behind its name."""
        message = pa.schema([pa.field("column", kind)]).serialize()
        return ColumnType(f"{kind} {note}".rstrip(), base64.b64encode(message).decode())

    def arrow(self) -> pa.DataType:
        """Rebuild the type, with everything nested in it."""
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.ipc))).field(0).type


@dataclass(frozen=True)
class Columns:
    """The corpus columns as they were resolved; ``kept`` are the metadata columns with their types."""

    id: str
    text: str
    title: str | None
    kept: dict[str, ColumnType] = field(default_factory=dict)

    def kept_schema(self) -> pa.Schema:
        """Return the metadata columns as fields of an embedding shard, in the order of ``kept``."""
        return pa.schema([pa.field(name, kind.arrow()) for name, kind in self.kept.items()])
