"""From the listing of a corpus to a plan: keep the numbers of old objects, scan the new ones."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import ray

from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.corpus import ScannedObject, check_all_columns, coding_of, one_a_line, scan_object
from bge_ray.pipeline.embed.sources import EarlierObjects
from bge_ray.pipeline.engine.progress import Step
from bge_ray.pipeline.engine.tasks import run_tasks
from bge_ray.records.chunking import Chunking
from bge_ray.records.columns import Columns
from bge_ray.records.ids import MAX_CHUNKS_PER_ROW, MAX_OBJECTS, MAX_ROWS_PER_OBJECT
from bge_ray.records.model import ModelSpec
from bge_ray.records.plan import CorpusObject, Plan, UnitLimits
from bge_ray.settings.sections import BatchingSettings, CorpusSettings
from bge_ray.storage.objects import ObjectInfo, Storage

logger = logging.getLogger(__name__)

# Of a unit by `batching.unit_rows: auto`; fewer rows than the least are not worth their file.
MOST_AUTO_ROWS, LEAST_AUTO_ROWS = 50_000, 64
# With so many units each, an encoder that is done before the others idles for a sixteenth of the run at most.
UNITS_PER_ENCODER = 16
# What one scanning task takes: many small objects, whose requests wait side by side, or one large one.
SCAN_OBJECTS, SCAN_BYTES, SCAN_THREADS = 128, 64_000_000, 16
SCAN_CPUS = 0.5
# Objects read and encoded together: so many at most, and their bytes as a share of batching.unit_bytes,
# since the text of a compressed object is a few times its bytes.
GROUP_OBJECTS, GROUP_SHARE = 256, 0.25


def unchanged_objects(
    listed: Sequence[ObjectInfo], previous: Plan | None, settings: CorpusSettings
) -> dict[str, CorpusObject]:
    """Return the objects of the previous plan whose content is still the same and read the same, by URI."""
    known = {o.uri: o for o in (previous.objects if previous else ())}
    same = {}
    for info in listed:
        there = known.get(info.uri)
        if (
            there is not None
            and info.is_same(there.size, there.etag)
            and there.coding == coding_of(info.uri, settings)
        ):
            same[info.uri] = there
    return same


def seen_again(
    unchanged: Mapping[str, CorpusObject], scanned: Sequence[ScannedObject], columns: Columns
) -> dict[str, CorpusObject]:
    """Return objects that stay as they were cut, with what a later scan found of new columns in their paths.

    Raises:
        CorpusError: an object lacks a column, or has it in a type that does not fit.
    """
    check_all_columns(scanned, columns)
    found = {scan.info.uri: scan.partitions for scan in scanned}
    return {uri: dataclasses.replace(unchanged[uri], partitions=found[uri]) for uri in found}


def settle_limits(
    batching: BatchingSettings,
    infos: Sequence[ObjectInfo],
    encoders: int,
    model: ModelSpec,
    chunking: Chunking | None = None,
) -> UnitLimits:
    """Return when a unit of new objects is full, with all its outputs.

    Args:
        batching: unit_rows (auto gives each encoder UNITS_PER_ENCODER units) and unit_bytes.
        infos: the new objects; how their bytes share out the units is all that is known before the scan.
        encoders: that the cluster has room for.
        model: what it makes of a row counts.
        chunking: with it, what it makes of each chunk counts.
    """
    vector_bytes = sum(output.fixed_bytes for output in model.outputs)
    token_bytes = sum(output.token_bytes for output in model.outputs)
    max_tokens = model.max_length
    if chunking is not None:
        token_bytes += math.ceil(vector_bytes / (chunking.max_tokens - chunking.overlap_tokens))
        max_tokens = chunking.max_tokens * MAX_CHUNKS_PER_ROW
    limits = UnitLimits(
        max_rows=MOST_AUTO_ROWS if batching.unit_rows == "auto" else batching.unit_rows,
        max_bytes=batching.unit_bytes,
        vector_bytes=vector_bytes,
        token_bytes=token_bytes,
        max_tokens=max_tokens,
    )
    if batching.unit_rows != "auto":
        return limits
    share = max(1, -(-sum(info.size for info in infos) // (encoders * UNITS_PER_ENCODER)))
    return dataclasses.replace(limits, share_bytes=share, min_rows=LEAST_AUTO_ROWS)


def scan_objects(
    storage: Storage,
    infos: Sequence[ObjectInfo],
    settings: CorpusSettings,
    limits: UnitLimits,
    log_interval_s: float,
    watch: Callable[[], None] = lambda: None,
) -> list[ScannedObject]:
    """Scan objects in Ray tasks, in the order given, and tell every ``log_interval_s`` how far that is.

    Raises:
        CorpusError: one or more objects are unreadable; names the first ones and says how many.
    """
    batches = list(_scan_batches(infos))
    found: list[list[ScannedObject | str]] = [[] for _ in batches]
    cpus = ray.cluster_resources().get("CPU", 1.0)
    with Step("planning", "corpus objects", len(infos), log_interval_s) as step:
        done = run_tasks(
            scan_task,
            ((storage, batch, settings, limits) for batch in batches),
            at_once=max(1, int(cpus / SCAN_CPUS)),
            watch=watch,
            num_cpus=min(SCAN_CPUS, cpus),
        )
        for number, results in done:
            found[number] = results
            step.advance(len(results))
    results = [result for batch in found for result in batch]
    errors = [result for result in results if isinstance(result, str)]
    if errors:
        raise CorpusError(f"{len(errors)} of {len(infos)} corpus objects cannot be read:{one_a_line(errors)}")
    return [result for result in results if isinstance(result, ScannedObject)]


def _scan_batches(infos: Sequence[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    batch: list[ObjectInfo] = []
    n_bytes = 0
    for info in infos:
        if batch and (len(batch) >= SCAN_OBJECTS or n_bytes + info.size > SCAN_BYTES):
            yield batch
            batch, n_bytes = [], 0
        batch.append(info)
        n_bytes += info.size
    if batch:
        yield batch


def scan_task(
    storage: Storage, infos: Sequence[ObjectInfo], settings: CorpusSettings, limits: UnitLimits
) -> list[ScannedObject | str]:
    """Return what was found in each object, or why it cannot be read."""

    def scan(info: ObjectInfo) -> ScannedObject | str:
        try:
            return scan_object(storage, info, settings, limits)
        except (CorpusError, StorageError) as error:
            return str(error)

    with ThreadPoolExecutor(min(SCAN_THREADS, len(infos))) as pool:
        return list(pool.map(scan, infos))


def extend_plan(
    unchanged: Mapping[str, CorpusObject],
    previous: Plan | None,
    scanned: Sequence[ScannedObject],
    columns: Columns,
    limits: UnitLimits,
) -> Plan:
    """Number the new objects after every number ever given, and leave out those that are gone.

    An object whose content changed is a new object: its old vectors and ids go with the old number.

    Args:
        unchanged: the objects that stay, of `unchanged_objects`.
        previous: the plan before.
        scanned: the objects that are new, in the order of their numbers.
        columns: of the data set.
        limits: by which they were scanned; small ones are grouped up to the size of a unit.

    Raises:
        CorpusError: an object lacks a column, or has more rows than a vector id can count.
    """
    check_all_columns(scanned, columns)
    objects = dict(unchanged)
    earlier = EarlierObjects(previous, [*unchanged, *(scan.info.uri for scan in scanned)])
    number = previous.next_object_no if previous else 0
    for scan, group in zip(scanned, _groups(scanned, number, limits), strict=True):
        found = dataclasses.replace(scan.under(number, group), earlier=earlier.of(scan))
        if found.n_rows > MAX_ROWS_PER_OBJECT or number >= MAX_OBJECTS:
            raise CorpusError(
                f"{found.uri}: {found.n_rows} rows as object {number}: too many for a vector id"
            )
        objects[found.uri] = found
        number += 1
    return Plan(tuple(sorted(objects.values(), key=lambda o: o.object_no)), number)


def _groups(scanned: Sequence[ScannedObject], first_no: int, limits: UnitLimits) -> list[int | None]:
    """Return the group of each object: neighbours of one unit each, as many as fit into one together."""
    whole = sum(sum(scan.unit_rows) for scan in scanned)
    n_bytes = sum(scan.info.size for scan in scanned)
    most_rows = limits.max_rows
    if limits.share_bytes is not None and n_bytes:
        share = math.ceil(whole * limits.share_bytes / n_bytes)
        most_rows = min(most_rows, max(limits.min_rows, share))
    groups: list[int | None] = [None] * len(scanned)
    members: list[int] = []
    rows = size = 0

    def close() -> None:
        if len(members) > 1:
            for place in members:
                groups[place] = first_no + members[0]

    for place, scan in enumerate(scanned):
        if len(scan.unit_rows) != 1:  # without rows there is nothing to do, with more there is enough
            continue
        more, text_bytes = rows + scan.unit_rows[0], int((size + scan.info.size) / GROUP_SHARE)
        too_large = more > most_rows or limits.bytes_of(more, text_bytes) > limits.max_bytes
        if members and (too_large or len(members) >= GROUP_OBJECTS):
            close()
            members, rows, size = [], 0, 0
        members.append(place)
        rows += scan.unit_rows[0]
        size += scan.info.size
    close()
    return groups
