"""The command `bge-ray changes`: what became of a data set since a change, as JSON lines or Parquet."""

import dataclasses
import functools
import io
from typing import TYPE_CHECKING

from bge_ray.errors import SettingsError
from bge_ray.jobs import Job
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings

if TYPE_CHECKING:
    import pyarrow as pa

    from bge_ray.dataset.changes import Difference

SAYS = (
    "Tell what became of a data set since a change that a follower knows: ids that are gone, shards to read."
)


def changes_job(since: int, output: str | None) -> Job:
    """Return the command as a job; see `_changes`."""
    return Job("changes", SAYS, ("output",), functools.partial(_changes, since=since, output=output))


def _changes(settings: Settings, dry_run: bool, _: StopRequest, since: int, output: str | None) -> str:
    """Return the difference as JSON lines, or write it to a file that is not there yet.

    Raises:
        SettingsError: there is no complete data set, no such change, or a file is there.
        DatasetMismatchError: a change that leads to the manifest is gone or damaged.
    """
    from bge_ray.dataset.changes import read_difference
    from bge_ray.dataset.folder import read_complete
    from bge_ray.dataset.pointer import refuse_pointer
    from bge_ray.storage.objects import Storage

    settings.require("output.uri")
    storage, root = Storage(settings.output.storage_timeout_s), str(settings.output.uri)
    # Numbers of changes are those of one data set.
    refuse_pointer(storage, root, "output.uri")
    manifest = read_complete(storage, root)[1]
    difference = read_difference(storage, root, manifest, since)
    table = difference_table(difference)
    if output is None or dry_run:
        return _as_lines(table).rstrip("\n")
    data = _as_parquet(table) if output.endswith(".parquet") else _as_lines(table).encode()
    if not storage.create(output, data):
        raise SettingsError(f"--output {output}: is there already; choose another name")
    return f"{len(table) - 1:,} records in {output}, up to change {difference.number}"


def difference_table(difference: "Difference") -> "pa.Table":
    """Return a record for each range of ids that is gone, and for each shard to read, to be applied in order.

    ``action`` is removed, replaced, added, and of the last record, without which the list is cut off, end;
    ``change`` is where to go on from; ``first_id`` and ``stop_id`` bound the ids, the second exclusive; of a
    shard there are also ``path`` below the data set, ``rows``, ``bytes`` and ``sha256``.
    """
    import pyarrow as pa

    from bge_ray.records.ids import id_range

    schema = pa.schema(
        [
            pa.field("change", pa.int64(), nullable=False),
            pa.field("action", pa.string(), nullable=False),
            *(pa.field(name, pa.int64()) for name in ("first_id", "stop_id")),
            pa.field("path", pa.string()),
            *(pa.field(name, pa.int64()) for name in ("rows", "bytes")),
            pa.field("sha256", pa.string()),
        ]
    )
    records: list[dict[str, object]] = [
        {"action": "removed", "first_id": a, "stop_id": b} for a, b in difference.removed
    ]
    for action, markers in (("replaced", difference.replaced), ("added", difference.added)):
        for marker in markers:
            unit, fact = marker.unit, marker.embeddings
            first, stop = id_range(unit.object_no, unit.first_row, unit.n_rows)
            file = dataclasses.asdict(fact) if fact is not None else {}
            records.append({"action": action, "first_id": first, "stop_id": stop, **file})
    records.append({"action": "end"})
    return pa.Table.from_pylist([{"change": difference.number, **record} for record in records], schema)


def _as_lines(table: "pa.Table") -> str:
    import json

    records = ({k: v for k, v in record.items() if v is not None} for record in table.to_pylist())
    return "".join(json.dumps(record) + "\n" for record in records)


def _as_parquet(table: "pa.Table") -> bytes:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
