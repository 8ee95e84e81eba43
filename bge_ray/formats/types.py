"""Arrow types of metadata columns: the form they are kept in, and one type for several objects.

It knows types only, no values. `plain_type` says how a column is kept, `unify_types` which type
holds the values of two others without loss.
"""

from collections.abc import Callable, Iterable

import pyarrow as pa

_SIGNED = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
_UNSIGNED = (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
_FLOATS = (pa.float16(), pa.float32(), pa.float64())


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that a column is kept in: the same values without what only says how they are stored.

    A dictionary becomes its values, an extension type (a UUID, say) its storage; the long and the view
    forms of text, binary and lists become the usual ones. Nested fields may be null and carry no
    metadata.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return rebuild(kind, plain_type)


def list_of(kind: pa.DataType) -> pa.DataType:
    """Return the type of lists of ``kind``, its field named as Parquet does."""
    return pa.list_(_element(kind))


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column of this type is kept as strings."""
    return bool(pa.types.is_string(plain_type(kind)))


def extension_names(kind: pa.DataType) -> list[str]:
    """Return the names of the extension types in a type, those of nested fields included."""
    if isinstance(kind, pa.BaseExtensionType):
        return [kind.extension_name]
    if pa.types.is_dictionary(kind):
        return extension_names(kind.value_type)
    nested = [extension_names(kind.field(i).type) for i in range(kind.num_fields)]
    return list(dict.fromkeys(name for names in nested for name in names))


def unify_types(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the type that holds the values of two plain types, or None where they disagree.

    Null goes with anything, integers and floats with a wider one, an integer with a float as a double
    (a value that no double equals is refused when it is read). Lists, structs and maps agree where what
    is in them does; a struct has the fields of both, those of ``one`` first.
    """
    if one.equals(other):
        return one
    if pa.types.is_null(one) or pa.types.is_null(other):
        return other if pa.types.is_null(one) else one
    if _is_list(one) and _is_list(other):
        inner = unify_types(one.value_type, other.value_type)
        return None if inner is None else list_of(inner)
    if pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(other):
        inner = unify_types(one.value_type, other.value_type) if one.list_size == other.list_size else None
        return None if inner is None else pa.list_(_element(inner), one.list_size)
    if pa.types.is_map(one) and pa.types.is_map(other):
        key, item = unify_types(one.key_type, other.key_type), unify_types(one.item_type, other.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _unify_structs(one, other)
    return _unify_numbers(one, other)


def unify_all(kinds: Iterable[pa.DataType]) -> pa.DataType | None:
    """Return the type that holds the values of all plain types, null for none of them."""
    found = pa.null()
    for kind in kinds:
        unified = unify_types(found, kind)
        if unified is None:
            return None
        found = unified
    return found


def without_nulls(kind: pa.DataType) -> pa.DataType:
    """Return a plain type with string where nothing but nulls was seen, which readers of Parquet know."""
    if pa.types.is_null(kind):
        return pa.string()
    return rebuild(kind, without_nulls)


def rebuild(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Change the types nested in a type; a type with none in it comes back as it is."""
    if _is_list(kind):
        return list_of(change(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_element(change(kind.value_type)), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, change(f.type)) for f in kind.fields])
    if pa.types.is_map(kind):
        return pa.map_(change(kind.key_type), change(kind.item_type))
    return kind


def _unify_structs(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    fields = {f.name: f.type for f in one.fields}
    for f in other.fields:
        kind = unify_types(fields[f.name], f.type) if f.name in fields else f.type
        if kind is None:
            return None
        fields[f.name] = kind
    return pa.struct(list(fields.items()))


def _unify_numbers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    is_int = pa.types.is_integer(one), pa.types.is_integer(other)
    is_number = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (one, other))
    if not is_number:
        return None
    if not any(is_int):
        return max(one, other, key=_FLOATS.index)
    if not all(is_int):
        return pa.float64()
    same_sign = pa.types.is_signed_integer(one) == pa.types.is_signed_integer(other)
    if same_sign:
        return max(one, other, key=lambda kind: int(kind.bit_width))
    signed, unsigned = (one, other) if pa.types.is_signed_integer(one) else (other, one)
    if pa.types.is_uint64(unsigned):
        return None
    wider = _SIGNED[_UNSIGNED.index(unsigned) + 1]
    return max(signed, wider, key=lambda kind: int(kind.bit_width))


def _is_list(kind: pa.DataType) -> bool:
    is_view = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or is_view)


def _element(kind: pa.DataType) -> pa.Field:
    return pa.field("element", kind)
