"""From the listing of a corpus to a plan: keep the numbers of old objects, scan the new ones."""

import logging
from collections.abc import Mapping, Sequence

import pyarrow as pa
import ray
import ray.data

from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.corpus import ScannedObject, check_columns, coding_of, scan_object
from bge_ray.pipeline.engine.progress import Step
from bge_ray.pipeline.engine.receipts import data_context
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.columns import Columns
from bge_ray.records.ids import MAX_OBJECTS, MAX_ROWS_PER_OBJECT
from bge_ray.records.plan import CorpusObject, Plan, UnitLimits
from bge_ray.settings.sections import CorpusSettings
from bge_ray.storage.objects import ObjectInfo, Storage

logger = logging.getLogger(__name__)

MAX_NAMED_OBJECTS = 10


def unchanged_objects(
    listed: Sequence[ObjectInfo], previous: Plan | None, settings: CorpusSettings
) -> dict[str, CorpusObject]:
    """Return the objects of the previous plan whose content is still the same and read the same, by URI."""
    known = {o.uri: o for o in (previous.objects if previous else ())}
    same = {}
    for info in listed:
        there = known.get(info.uri)
        now = (info.size, info.etag, coding_of(info.uri, settings))
        if there is not None and (there.size, there.etag, there.coding) == now:
            same[info.uri] = there
    return same


def scan_objects(
    storage: Storage,
    infos: Sequence[ObjectInfo],
    settings: CorpusSettings,
    limits: UnitLimits,
    num_tasks: int,
    log_interval_s: float,
) -> list[ScannedObject]:
    """Scan objects in Ray tasks, in the order given, and tell every ``log_interval_s`` how far that is.

    Raises:
        CorpusError: one or more objects are unreadable; names the first ones and says how many.
    """
    items = [{"info": to_json(info).decode(), "no": number} for number, info in enumerate(infos)]
    with data_context():
        batches = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(
                _scan_batch,
                batch_format="pyarrow",
                batch_size=1,
                num_cpus=0.5,
                compute=ray.data.TaskPoolStrategy(size=num_tasks),
                fn_kwargs={"storage": storage, "settings": settings, "limits": limits},
            )
            .iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
        )
    with Step("planning", "corpus objects", len(infos), log_interval_s) as step:
        scanned = [row for batch in step.each(batches) for row in batch.to_pylist()]
    scanned.sort(key=lambda row: row["no"])
    errors = [row["error"] for row in scanned if row["error"]]
    if errors:
        more = f"\n  and {len(errors) - MAX_NAMED_OBJECTS} more" if len(errors) > MAX_NAMED_OBJECTS else ""
        raise CorpusError(
            f"{len(errors)} of {len(infos)} corpus objects cannot be read:\n  "
            + "\n  ".join(errors[:MAX_NAMED_OBJECTS])
            + more
        )
    return [from_json(ScannedObject, row["scanned"]) for row in scanned]


def _scan_batch(batch: pa.Table, storage: Storage, settings: CorpusSettings, limits: UnitLimits) -> pa.Table:
    scanned: list[str | None] = []
    errors: list[str | None] = []
    for text in batch["info"].to_pylist():
        info = from_json(ObjectInfo, text)
        try:
            scanned.append(to_json(scan_object(storage, info, settings, limits)).decode())
            errors.append(None)
        except (CorpusError, StorageError) as error:
            scanned.append(None)
            errors.append(str(error))
    return pa.table(
        {"no": batch["no"], "scanned": pa.array(scanned, pa.string()), "error": pa.array(errors, pa.string())}
    )


def extend_plan(
    unchanged: Mapping[str, CorpusObject],
    previous: Plan | None,
    scanned: Sequence[ScannedObject],
    columns: Columns,
) -> Plan:
    """Number the new objects after every number ever given, and leave out those that are gone.

    An object whose content changed is a new object: its old vectors and ids go with the old number.

    Args:
        unchanged: the objects that stay, of `unchanged_objects`.
        previous: the plan before.
        scanned: the objects that are new, in the order of their numbers.
        columns: of the data set.

    Raises:
        CorpusError: an object lacks a column, or has more rows than a vector id can count.
    """
    objects = dict(unchanged)
    number = previous.next_object_no if previous else 0
    for scan in scanned:
        check_columns(scan, columns)
        found = scan.under(number)
        if found.n_rows > MAX_ROWS_PER_OBJECT or number >= MAX_OBJECTS:
            raise CorpusError(
                f"{found.uri}: {found.n_rows} rows as object {number}: too many for a vector id"
            )
        objects[found.uri] = found
        number += 1
    return Plan(tuple(sorted(objects.values(), key=lambda o: o.object_no)), number)
