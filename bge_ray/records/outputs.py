"""What a forward pass yields for a row: named columns, each of one kind, and how Arrow holds them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import pyarrow as pa

OUTPUT_DTYPES = {"float16": pa.float16(), "float32": pa.float32()}
VALUE_BYTES = {"float16": 2, "float32": 4}

# A text has fewer distinct tokens than tokens; this share is that of passages of a hundred.
DISTINCT_TOKENS = 0.64
INDEX_BYTES = 4

OutputKind: TypeAlias = Literal["dense", "sparse", "multi", "scalar"]


@dataclass(frozen=True)
class Output:
    """One column of results.

    A ``dense`` output is one vector of ``dim`` numbers a row, ``multi`` some of them, ``sparse`` weights
    under ascending indices below ``dim``, ``scalar`` one number (``dim`` 1). ``dtype`` is how they are
    stored: float16 or float32, whatever they were computed in. ``head`` is the sha256 of the file that holds
    the weights of its head, and empty where the model's own weights are all.
    """

    name: str
    kind: OutputKind
    dim: int
    dtype: str
    head: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in OUTPUT_DTYPES:
            raise ValueError(f"output {self.name}: dtype {self.dtype} is none of {', '.join(OUTPUT_DTYPES)}")
        if self.dim < 1:
            raise ValueError(f"output {self.name}: dim {self.dim} is less than 1")

    @property
    def fixed_bytes(self) -> int:
        """Bytes of a row's value that do not depend on its length, uncompressed."""
        return VALUE_BYTES[self.dtype] * self.dim if self.kind in ("dense", "scalar") else 0

    @property
    def token_bytes(self) -> int:
        """About how many bytes each token of a row adds to its value, uncompressed."""
        if self.kind == "multi":
            return VALUE_BYTES[self.dtype] * self.dim
        if self.kind == "sparse":
            return math.ceil((VALUE_BYTES[self.dtype] + INDEX_BYTES) * DISTINCT_TOKENS)
        return 0

    def field(self) -> pa.Field:
        """Return the column of a table in which every row has this output."""
        return pa.field(self.name, self.type(), nullable=False)

    def type(self) -> pa.DataType:
        """Return the Arrow type of one row's value; a vector of a multi output is the bytes of its numbers.

        Lists of numbers write ten times and read twice as slowly to Parquet (decision 21).
        """
        number = pa.field("element", OUTPUT_DTYPES[self.dtype], nullable=False)
        if self.kind == "scalar":
            return number.type
        if self.kind == "dense":
            return pa.list_(number, self.dim)
        if self.kind == "multi":
            vector = pa.binary(VALUE_BYTES[self.dtype] * self.dim)
            return pa.list_(pa.field("element", vector, nullable=False))
        index = pa.field("element", pa.int32(), nullable=False)
        return pa.struct(
            [
                pa.field("indices", pa.list_(index), nullable=False),
                pa.field("values", pa.list_(number), nullable=False),
            ]
        )


def row_bytes(outputs: Iterable[Output], n_tokens: float) -> float:
    """Return about how many bytes all outputs of a row of so many tokens take, uncompressed."""
    return sum(output.fixed_bytes + output.token_bytes * n_tokens for output in outputs)
