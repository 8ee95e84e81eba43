"""Filters: SQL expressions over the kept columns of a data set, checked before anything is done with them.

DuckDB reads, plans and computes them. Only an expression gets so far: what reads tables or files, counts over
rows, or gives another answer at another time is refused by what DuckDB's own parser made of it, and the
database that computes knows no file besides.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.errors import SettingsError
from bge_ray.records.dataset import DatasetSpec

# Imported where it is used: beside Ray modules live as long as the process, and DuckDB would tell of leaks
# at its end, of searches without a filter, too.
if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# What a computation may take beside the columns it is given.
MEMORY = "512MB"
# Deeper expressions than people write, and shallower than what the reader of JSON stands.
MAX_DEPTH = 150
# Filters that are computed in one pass over the rows.
AT_ONCE = 64

_ROWS = "passages"
_PREFIX = "SELECT ("
# What an expression may be made of, as DuckDB's parser names it.
_PARTS = frozenset(
    (
        "COLUMN_REF",
        "CONSTANT",
        "COMPARISON",
        "CONJUNCTION",
        "FUNCTION",
        "OPERATOR",
        "CAST",
        "TYPE",
        "BETWEEN",
        "CASE",
        "LAMBDA",
        "COLLATE",
    )
)
_REFUSED_PARTS = {
    "SUBQUERY": "a query within it",
    "WINDOW": "a window over rows",
    "STAR": "a star, or COLUMNS",
    "PARAMETER": "a parameter",
}
# Short forms that DuckDB spells out with functions that are allowed.
_SHORT_FORMS = frozenset(
    (
        "if",
        "nullif",
        "split_part",
        "fmod",
        "fdiv",
        "date_add",
        "days_in_month",
        "list_append",
        "array_append",
        "list_prepend",
        "array_prepend",
        "array_push_back",
        "array_push_front",
        "list_min",
        "list_max",
        "list_sum",
        "list_avg",
        "list_count",
        "list_first",
        "list_last",
        "list_bool_or",
        "list_bool_and",
        "list_reverse",
        "array_reverse",
        "map_contains_value",
        "map_contains_entry",
    )
)
# With one argument it is the time since then.
_BY_THE_CLOCK = frozenset(("age",))

# Whether each of (n,) rows passes, or why that cannot be told of some.
Marks: TypeAlias = npt.NDArray[np.bool_] | str


@dataclass(frozen=True)
class Filter:
    """A filter that was checked: as DuckDB writes it, without blanks and comments, and its columns."""

    sql: str
    columns: tuple[str, ...] = ()

    def both(self, other: "Filter") -> "Filter":
        """Return the filter that what passes both of them passes."""
        return Filter(f"({self.sql} AND {other.sql})", tuple(dict.fromkeys((*self.columns, *other.columns))))


class FilterReader:
    """Reads filters over the kept columns of one data set."""

    def __init__(self, spec: DatasetSpec, root: str) -> None:
        """Take what the data set at ``root`` keeps.

        Raises:
            SettingsError: it keeps no columns.
        """
        self._kept = spec.columns.kept_schema()
        if not self._kept.names:
            raise SettingsError(
                f"{root} keeps no columns of its corpus, so there is nothing to filter by; embed with "
                "corpus.keep_columns, which encodes nothing anew"
            )
        self._root = root
        self._database = connect()
        self._read: dict[str, Filter | str] = {}

    def read(self, text: str) -> Filter:
        """Check an expression.

        Raises:
            SettingsError: it is none, or none that a filter may be, or neither true nor false; names the
                column or the place.
        """
        if text not in self._read:
            try:
                self._read[text] = self._checked(text)
            except SettingsError as error:
                self._read[text] = str(error)
        found = self._read[text]
        if isinstance(found, str):
            raise SettingsError(found)
        return found

    def _checked(self, text: str) -> Filter:
        if not text.strip():
            raise SettingsError("is empty")
        query = self._parsed(text)
        (tree,) = query["statements"][0]["node"]["select_list"]
        used = {self._column(name, place): None for name, place in _columns_of(tree, text)}
        alike = {name.lower(): name for name in used}
        if len(alike) < len(used):
            raise SettingsError(
                f"{', '.join(sorted(used))}: differ in case alone, of which SQL takes no notice"
            )
        written = _one(self._database, "SELECT json_deserialize_sql(?::JSON)", json.dumps(query))
        found = Filter(written.removeprefix("SELECT "), tuple(used))
        self._plan(found)
        return found

    def _parsed(self, text: str) -> Any:
        """Return the query that has the expression as its one column and nothing else, as DuckDB has it."""
        found, plain = (_parse(self._database, f"{_PREFIX}{some}\n)") for some in (text, "TRUE"))
        if found["error"]:
            place = _place(text, int(found.get("position") or len(_PREFIX)))
            raise SettingsError(f"{found['error_message']}{place}")
        nodes = [dict(query["statements"][0]["node"]) for query in (found, plain)]
        columns = [node.pop("select_list") for node in nodes]
        if len(found["statements"]) != 1 or len(columns[0]) != 1 or nodes[0] != nodes[1]:
            raise SettingsError("is more than one expression")
        return found

    def _column(self, name: str, place: str) -> str:
        if name in self._kept.names:
            return name
        alike = [there for there in self._kept.names if there.lower() == name.lower()]
        if len(alike) == 1:
            return str(alike[0])
        raise SettingsError(
            f"column {name!r}{place}: {self._root} keeps none of that name, only "
            f"{', '.join(self._kept.names)}"
        )

    def _plan(self, found: Filter) -> None:
        """Have the expression planned against the columns' types, and computed of a row of nulls."""
        import duckdb

        for name in found.columns:
            field = self._kept.field(name)
            try:
                with _over(self._database, _nulls([field])):
                    self._database.table(_ROWS).fetchall()
            except duckdb.Error as error:
                raise SettingsError(f"column {name!r} is {field.type}, which no filter can read") from error
        fields = [pa.field("vector_id", pa.int64()), *(self._kept.field(name) for name in found.columns)]
        try:
            with _over(self._database, _nulls(fields)):
                planned = self._database.sql(_selected([found]))
                kind = str(planned.types[0])
                if kind == "BOOLEAN":
                    planned.fetchall()
        except duckdb.Error as error:
            raise SettingsError(_reason(error)) from error
        if kind != "BOOLEAN":
            raise SettingsError(f"is of type {kind.strip(chr(34))}, not a condition that is true or false")


def _nulls(fields: Sequence[pa.Field]) -> pa.Table:
    return pa.table([pa.nulls(1, field.type) for field in fields], names=[field.name for field in fields])


def connect() -> "DuckDBPyConnection":
    """Return a database in memory that sees no files, knows no other time zone than UTC, and stays so."""
    import duckdb

    database = duckdb.connect(
        ":memory:",
        config={
            "enable_external_access": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
            "threads": "1",
            "memory_limit": MEMORY,
        },
    )
    for setting in ("TimeZone = 'UTC'", f"max_expression_depth = {MAX_DEPTH}", "lock_configuration = true"):
        database.execute(f"SET {setting}").fetchall()
    return database


def compute(database: "DuckDBPyConnection", table: pa.Table, filters: Sequence[Filter]) -> list[Marks]:
    """Tell which of n rows pass each of some filters.

    Args:
        database: from `connect`.
        table: n rows with ``vector_id`` and the columns of all filters, and any other.
        filters: from `FilterReader.read`, AT_ONCE of them at most: they share one pass over the rows.

    Returns:
        For each filter (n,) whether it is true, not false and not null; or why it cannot be told of some row.
    """
    import duckdb

    used = {name for one in filters for name in one.columns}
    # What differs in case alone is one column to DuckDB, which takes either.
    if len({name.lower() for name in used}) == len(used):
        try:
            return [*_computed(database, table, filters)]
        except duckdb.Error:
            pass  # one of them cannot be computed of some row; which one, and why, only each alone tells
    return [_alone(database, table, one) for one in filters]


def _alone(database: "DuckDBPyConnection", table: pa.Table, one: Filter) -> Marks:
    import duckdb

    try:
        return _computed(database, table, [one])[0]
    except duckdb.Error as error:
        return _reason(error)


def _computed(
    database: "DuckDBPyConnection", table: pa.Table, filters: Sequence[Filter]
) -> list[npt.NDArray[np.bool_]]:
    names = dict.fromkeys(["vector_id", *(name for one in filters for name in one.columns)])
    with _over(database, table.select(list(names))):
        found = database.sql(_selected(filters)).to_arrow_table()
    return [pc.fill_null(column, False).to_numpy() for column in found.columns]


def _selected(filters: Sequence[Filter]) -> str:
    columns = ", ".join(f"{one.sql} AS passes_{number}" for number, one in enumerate(filters))
    return f"SELECT {columns} FROM {_ROWS}"  # noqa: S608 - each is DuckDB's own writing of what was checked


@contextlib.contextmanager
def _over(database: "DuckDBPyConnection", table: pa.Table) -> Iterator[None]:
    """Have a table as what filters are computed over."""
    database.register(_ROWS, table)
    try:
        yield
    finally:
        database.unregister(_ROWS)


def _parse(database: "DuckDBPyConnection", query: str) -> Any:
    return json.loads(_one(database, "SELECT json_serialize_sql(?)", query))


def _one(database: "DuckDBPyConnection", query: str, value: str) -> str:
    ((found,),) = database.execute(query, [value]).fetchall()
    return str(found)


def _columns_of(tree: Any, text: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each column of an expression and where it stands; refuse what no filter may have.

    Raises:
        SettingsError: names it, and where it stands.
    """
    # With the names that lambdas around it have given to what they are asked of.
    todo: list[tuple[Any, frozenset[str]]] = [(tree, frozenset())]
    while todo:
        node, given = todo.pop()
        if isinstance(node, list):
            todo += [(part, given) for part in reversed(node)]
            continue
        if not isinstance(node, dict):
            continue
        part = node.get("class")
        if part is not None:
            place = _place(text, node["query_location"])
            if part not in _PARTS:
                what = _REFUSED_PARTS.get(part, part.lower().replace("_", " "))
                raise SettingsError(f"{what}{place}: a filter is an expression over one passage")
            if part == "COLUMN_REF":
                name = node["column_names"][0]
                if name not in given:
                    yield name, place
                continue
            if part == "FUNCTION":
                _check_function(node["function_name"], place)
            if part == "LAMBDA":
                todo.append((node["expr"], given | _names_in(node["lhs"])))
                continue
        todo += [(value, given) for value in reversed(node.values())]


def _names_in(tree: Any) -> frozenset[str]:
    if isinstance(tree, list):
        return frozenset().union(*map(_names_in, tree))
    if not isinstance(tree, dict):
        return frozenset()
    if tree.get("class") == "COLUMN_REF":
        return frozenset(tree["column_names"][:1])
    return _names_in(list(tree.values()))


def _check_function(name: str, place: str) -> None:
    stabilities = _catalogue().get(name.lower())
    if stabilities is None:
        if name.lower() in _SHORT_FORMS:
            return
        raise SettingsError(f"{name}{place}: is no function of one passage that DuckDB has")
    if stabilities != {"CONSISTENT"} or name.lower() in _BY_THE_CLOCK:
        raise SettingsError(
            f"{name}{place}: gives another answer at another time or place; write the value that is meant"
        )


@functools.cache
def _catalogue() -> dict[str, set[str]]:
    """Return for each function of single values by what its answers may change, in any of its forms."""
    found: dict[str, set[str]] = {}
    query = "SELECT function_name, stability FROM duckdb_functions() WHERE function_type = 'scalar'"
    for name, stability in connect().execute(query).fetchall():
        found.setdefault(name.lower(), set()).add(stability)
    return found


def _place(text: str, position: int) -> str:
    """Say where in a text a position of the whole query is, which counts bytes; "" where there is none."""
    data = text.encode()
    if not 0 <= position - len(_PREFIX) <= len(data):
        return ""
    before = data[: position - len(_PREFIX)].decode(errors="ignore")
    return f" at character {len(before) + 1}"


def _reason(error: Exception) -> str:
    """Return what DuckDB says of an expression, without the query that it repeats."""
    return "; ".join(
        line.strip() for line in str(error).partition("\n\nLINE ")[0].splitlines() if line.strip()
    )
