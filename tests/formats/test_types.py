"""One type for several objects: it holds the values of each, or there is none."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.formats.types import extension_names, plain_type, unify_all, unify_types, without_nulls
from bge_ray.records.columns import ColumnType

LEAVES = st.sampled_from(
    [
        pa.null(), pa.bool_(), pa.int8(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64(), pa.float16(),
        pa.float32(), pa.float64(), pa.string(), pa.binary(), pa.binary(16), pa.date32(), pa.decimal128(9, 2),
        pa.timestamp("us", "UTC"), pa.timestamp("ms"), pa.duration("s"),
    ]
)  # fmt: skip
STORED = st.sampled_from(
    [pa.large_string(), pa.string_view(), pa.binary_view(), pa.uuid(), pa.dictionary(pa.int8(), pa.string())]
)


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        inner.map(lambda kind: pa.list_(kind, 2)),
        inner.map(lambda kind: pa.map_(pa.string(), kind)),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(pa.struct),
        inner.map(lambda kind: pa.struct([pa.field("a", kind, pa.types.is_null(kind), {"k": "v"})])),
    )


ANY = st.recursive(LEAVES | STORED, nested, max_leaves=4)
PLAIN = ANY.map(plain_type)


@given(ANY)
def test_a_type_survives_json_and_its_plain_form_is_stable(kind: pa.DataType) -> None:
    assert ColumnType.of(kind).arrow().equals(kind, check_metadata=True)
    plain = plain_type(kind)
    assert plain_type(plain) == plain
    assert extension_names(plain) == []
    assert ("arrow.uuid" in extension_names(kind)) == ("arrow.uuid" in str(kind))
    assert "null" not in str(without_nulls(plain)).replace("not null", "")


@given(PLAIN, PLAIN)
def test_two_types_have_one_that_holds_both(one: pa.DataType, other: pa.DataType) -> None:
    unified = unify_types(one, other)
    back = unify_types(other, one)
    assert (unified is None) == (back is None)
    assert unify_types(one, one) == one
    if unified is None:
        return
    assert unify_types(unified, one) == unify_types(unified, other) == unified, "it holds what it was made of"
    assert unify_all([other, pa.null(), one]) == back
    pa.nulls(2, one).cast(unified)


@pytest.mark.parametrize(
    ("one", "other", "unified"),
    [
        (pa.int8(), pa.int32(), pa.int32()),
        (pa.uint8(), pa.uint16(), pa.uint16()),
        (pa.uint8(), pa.int8(), pa.int16()),
        (pa.uint32(), pa.int8(), pa.int64()),
        (pa.uint64(), pa.int8(), None),
        (pa.float16(), pa.float32(), pa.float32()),
        (pa.int64(), pa.float32(), pa.float64()),
        (pa.bool_(), pa.int8(), None),
        (pa.timestamp("us"), pa.timestamp("ms"), None),
        (pa.decimal128(9, 2), pa.decimal128(10, 2), None),
        (pa.decimal128(9, 2), pa.int8(), None),
        (pa.binary(), pa.string(), None),
        (pa.list_(pa.int8()), pa.list_(pa.float32()), pa.list_(pa.float64())),
        (pa.list_(pa.int8()), pa.int8(), None),
        (pa.list_(pa.int8(), 2), pa.list_(pa.int8(), 3), None),
        (
            pa.struct({"a": pa.int8()}),
            pa.struct({"b": pa.int8()}),
            pa.struct({"a": pa.int8(), "b": pa.int8()}),
        ),
        (pa.struct({"a": pa.int8()}), pa.struct({"a": pa.string()}), None),
        (pa.map_(pa.string(), pa.null()), pa.map_(pa.string(), pa.int8()), pa.map_(pa.string(), pa.int8())),
    ],
)
def test_which_types_agree(one: pa.DataType, other: pa.DataType, unified: pa.DataType | None) -> None:
    assert unify_types(one, other) == unified
