"""What a forward pass yields for a row: named columns, each of one kind, and how Arrow holds them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import pyarrow as pa

OUTPUT_DTYPES = {"float16": pa.float16(), "float32": pa.float32()}
VALUE_BYTES = {"float16": 2, "float32": 4}

# What a passage of some length has, where it decides: vectors of a multi output, weights of a sparse one.
TYPICAL_TOKENS = 128

OutputKind: TypeAlias = Literal["dense", "sparse", "multi", "scalar"]


@dataclass(frozen=True)
class Output:
    """One column of results.

    A ``dense`` output is one vector of ``dim`` numbers a row, ``multi`` some of them, ``sparse`` weights
    under ascending indices below ``dim``, ``scalar`` one number (``dim`` 1). ``dtype`` is how they are
    stored: float16 or float32, whatever they were computed in.
    """

    name: str
    kind: OutputKind
    dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in OUTPUT_DTYPES:
            raise ValueError(f"output {self.name}: dtype {self.dtype} is none of {', '.join(OUTPUT_DTYPES)}")
        if self.dim < 1:
            raise ValueError(f"output {self.name}: dim {self.dim} is less than 1")

    @property
    def row_bytes(self) -> int:
        """About how many bytes the value of a row takes, uncompressed."""
        number = VALUE_BYTES[self.dtype]
        if self.kind == "sparse":
            return TYPICAL_TOKENS * (number + 4)
        return number * self.dim * (TYPICAL_TOKENS if self.kind == "multi" else 1)

    def field(self) -> pa.Field:
        """Return the column of a table in which every row has this output."""
        return pa.field(self.name, self.type(), nullable=False)

    def type(self) -> pa.DataType:
        """Return the Arrow type of one row's value."""
        number = pa.field("element", OUTPUT_DTYPES[self.dtype], nullable=False)
        if self.kind == "scalar":
            return number.type
        if self.kind == "dense":
            return pa.list_(number, self.dim)
        if self.kind == "multi":
            return pa.list_(pa.field("element", pa.list_(number, self.dim), nullable=False))
        index = pa.field("element", pa.int32(), nullable=False)
        return pa.struct(
            [
                pa.field("indices", pa.list_(index), nullable=False),
                pa.field("values", pa.list_(number), nullable=False),
            ]
        )
