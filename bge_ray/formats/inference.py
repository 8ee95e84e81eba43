"""Which Arrow type the values of a metadata column have, seen over a whole object.

JSON values have types of their own; a field of a CSV is a number only if the number, written again,
is the same text. A column whose values agree on no type is text.
"""

import math
import re
from typing import Any

import pyarrow as pa

from bge_ray.formats.types import list_of

# The integers up to here are doubles, too; beyond it two of them may share one.
MAX_EXACT_INT = 1 << 53
MAX_INT64 = (1 << 63) - 1
# Objects with more fields than this are maps written as JSON: as a struct each key would be a column.
MAX_NODES = 1000
MAX_DEPTH = 32
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_BOOLEANS = ({"true", "false"}, {"True", "False"}, {"TRUE", "FALSE"})


class JsonValues:
    """What the JSON values of one column were seen to be, with the values nested in them."""

    __slots__ = ("_depth", "_fields", "_items", "_kinds", "_largest", "_nodes", "_smallest", "_vague")

    def __init__(self, parent: "JsonValues | None" = None) -> None:
        """Start with no value; ``parent`` is what this one is nested in."""
        self._kinds: set[type] = set()
        self._smallest, self._largest = 0, 0
        self._vague = False  # no type can hold what was seen
        self._items: JsonValues | None = None
        self._fields: dict[str, JsonValues] = {}
        self._depth: int = 0 if parent is None else parent._depth + 1
        self._nodes: list[None] = [] if parent is None else parent._nodes  # one list for the whole tree
        self._nodes.append(None)

    @property
    def is_seen(self) -> bool:
        """Tell whether there was a value at all, null or not."""
        return bool(self._kinds)

    def add(self, value: Any) -> None:
        """Take one more value into account."""
        kind = type(value)
        self._kinds.add(kind)
        if kind is int:
            if value > self._largest:
                self._largest = value
            elif value < self._smallest:
                self._smallest = value
        elif kind is list:
            self._add_items(value)
        elif kind is dict:
            self._add_fields(value)

    def arrow_type(self) -> pa.DataType:
        """Return the type of the column: string where its values agree on none."""
        kind = self._agreed()
        return pa.string() if kind is None else kind

    def _add_items(self, values: list[Any]) -> None:
        if self._items is None and values:
            self._items = self._child()
        if self._items is not None:
            for value in values:
                self._items.add(value)

    def _add_fields(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            field = self._fields.get(name)
            if field is None and _is_unicode(name):
                field = self._child()
                if field is not None:
                    self._fields[name] = field
            if field is None:
                self._vague = True
            else:
                field.add(value)

    def _child(self) -> "JsonValues | None":
        if len(self._nodes) >= MAX_NODES or self._depth >= MAX_DEPTH:
            self._vague = True
            return None
        return JsonValues(self)

    def _agreed(self) -> pa.DataType | None:
        kinds = self._kinds - {type(None)}
        if self._vague:
            return None
        if not kinds:
            return pa.null()
        if kinds == {bool}:
            return pa.bool_()
        if kinds == {str}:
            return pa.string()
        if kinds <= {int, float}:
            return self._number(has_float=float in kinds, has_int=int in kinds)
        if kinds == {list}:
            inner = pa.null() if self._items is None else self._items._agreed()
            return None if inner is None else list_of(inner)
        if kinds == {dict}:
            return self._struct()
        return None

    def _number(self, *, has_float: bool, has_int: bool) -> pa.DataType | None:
        largest = max(self._largest, -self._smallest)
        if not has_float:
            is_int64 = self._largest <= MAX_INT64 and self._smallest >= -MAX_INT64 - 1
            return pa.int64() if is_int64 else None
        return None if has_int and largest > MAX_EXACT_INT else pa.float64()

    def _struct(self) -> pa.DataType | None:
        fields = {name: field._agreed() for name, field in self._fields.items()}
        # Parquet has no struct without fields.
        if not fields or any(kind is None for kind in fields.values()):
            return None
        return pa.struct(list(fields.items()))


class CsvValues:
    """What the fields of one CSV column were seen to be; an empty field says nothing."""

    __slots__ = ("_has_double", "_has_large", "_is_number", "_words")

    def __init__(self) -> None:
        """Start with no field."""
        self._is_number = True
        self._has_double, self._has_large = False, False
        self._words: set[str] = set()  # the first few distinct fields

    def add(self, text: str) -> None:
        """Take one more field into account."""
        if not text:
            return
        if len(self._words) <= 2:
            self._words.add(text)
        if self._is_number:
            self._add_number(text)

    def arrow_type(self) -> pa.DataType:
        """Return the type of the column."""
        if not self._words:
            return pa.null()
        if any(self._words <= booleans for booleans in _BOOLEANS):
            return pa.bool_()
        if not self._is_number or (self._has_double and self._has_large):
            return pa.string()
        return pa.float64() if self._has_double else pa.int64()

    def _add_number(self, text: str) -> None:
        if _INTEGER.fullmatch(text):
            value = int(text)
            self._has_large |= abs(value) > MAX_EXACT_INT
            self._is_number = -MAX_INT64 - 1 <= value <= MAX_INT64
        else:
            self._has_double = True
            self._is_number = is_written_double(text)


def is_written_double(text: str) -> bool:
    """Tell whether a text is how its finite double is written: so no digit is lost (1.50 and 1e5 are not)."""
    try:
        value = float(text)
    except ValueError:
        return False
    return math.isfinite(value) and repr(value) == text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
