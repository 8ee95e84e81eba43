"""`output.reuse: corpus`: texts that stand in several places are found by their hashes, and encoded once.

Before the run itself, in tasks that each hold little: the texts of all parcels and shards are hashed, bucket
by bucket it is found out which place gives a text to which others, and every giving place leaves what it
gives in one file. A shard takes it from its rows; a parcel encodes it, before all else. Then the run goes its
usual way, and its reader finds there what it would have encoded (`reuse.take_shared`).

Every step leaves files that follow from what is shared by whom, under a name that says so, so an attempt that
was cut off is taken up where it was. Nothing of it decides more than what is encoded where: whatever cannot
be read, or is not there, is encoded by whoever wants it.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from bge_ray.dataset.reuse import (
    PARALLEL_SHARDS,
    HashArray,
    KnownTexts,
    hash_array,
    hash_column,
    read_hashes,
    take_known,
)
from bge_ray.dataset.shared import (
    ENTRY,
    WORK,
    EntryArray,
    buckets,
    entries_of,
    given_schema,
    giving_places,
    pack_entries,
    pack_given,
    read_entries,
    read_gives,
    share,
)
from bge_ray.errors import StorageError
from bge_ray.pipeline.embed.read import Found, cut_parcel, read_parcels, tokenise_pieces
from bge_ray.pipeline.embed.reuse import Earlier
from bge_ray.pipeline.embed.sources import Places
from bge_ray.pipeline.embed.tasks import EmbedJob, ReadTask, Shared, UnitsTask
from bge_ray.pipeline.engine.flow import by_actors, by_tasks, follow, parcels, receipts
from bge_ray.pipeline.engine.isolation import LETHAL_DEATHS, Attempt
from bge_ray.pipeline.engine.model_stage import ModelJob
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import Sizes
from bge_ray.pipeline.engine.progress import Step
from bge_ray.pipeline.engine.rows import with_faults, with_tokens
from bge_ray.pipeline.engine.tasks import run_tasks
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import IdArray
from bge_ray.records.schemas import hash_texts
from bge_ray.storage.objects import join
from bge_ray.storage.sections import section_sizes

logger = logging.getLogger(__name__)

# Places whose texts share a file: it is in memory when it is written.
HASHED_PLACES = 16
# A task that dies for one parcel after the other finds no texts rather than end the run.
MOST_DEATHS = 4


@dataclass(frozen=True)
class Way:
    """How the steps are carried out.

    ``run`` is told what a step does, and runs a task once for each tuple of arguments; it returns what they
    returned, in any order. ``encode`` has the parcels of some tasks encoded, and leaves what they give.
    """

    run: Callable[[str, Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]
    encode: Callable[[EmbedJob, Sequence[ReadTask]], None]


def share_texts(job: EmbedJob, places: Places, way: Way) -> Shared | None:
    """Have every text that stands in several places encoded or taken once, for the others to find.

    Args:
        job: of the run.
        places: who may share.
        way: how it is done.

    Returns:
        Where it lies; None if nothing is shared.

    Raises:
        StorageError: a file of an earlier step cannot be read or written.
        IncompleteRunError: a task was lost again and again.
    """
    if places.n_places < 2:
        return None
    folder = f"{WORK}/{places.key(job.spec)}"
    shared = Shared(folder, len(places.shards), places.n_places, 0)
    batches = list(_batches(places.tasks))
    counts = way.run("finding texts", hash_parcels_task, [(job, shared, batch) for batch in batches])
    entries = {place: count for found in counts for place, count in found.items()}
    if not sum(entries.values()):
        return None
    firsts = range(0, len(places.shards), HASHED_PLACES)
    some = [(job, shared, first, places.shards[first : first + HASHED_PLACES]) for first in firsts]
    counts = way.run("finding texts of shards", hash_shards_task, some)
    entries |= {place: count for found in counts for place, count in found.items()}
    parts = buckets(sum(entries.values()))
    shared = dataclasses.replace(shared, n_buckets=len(parts))
    files = sorted(entries)
    arguments = [(job, shared, bucket, sections, files) for bucket, sections in enumerate(parts)]
    giving = np.unique(np.concatenate(way.run("sharing texts", share_task, arguments)))
    if not len(giving):
        return None
    _give(job, shared, places, giving, way)
    return shared


def _give(job: EmbedJob, shared: Shared, places: Places, giving: IdArray, way: Way) -> None:
    """Have all giving places leave what they give, where that is not there yet."""
    uri = join(job.root, shared.folder, "given")
    there = {info.uri.rpartition("/")[2] for info in job.storage.list_files(uri)}
    left = [place for place in giving.tolist() if shared.given_path(place).rpartition("/")[2] not in there]
    shards = [place for place in left if place < shared.n_shards]
    way.run("taking vectors", give_shard_task, [(job, shared, n, places.shards[n]) for n in shards])
    parcels = set(left) - set(shards)
    tasks = [task for task in (task.only(parcels) for task in places.tasks) if task.todo]
    if tasks:
        logger.info("%d parcels have texts that others have, too: these are encoded first", len(parcels))
        way.encode(dataclasses.replace(job, shared=shared), tasks)


def by_ray(
    model: ModelJob,
    stage: type,
    sizes: Sizes,
    watch: Callable[[], None],
    book: Callable[[Parcel], None],
    log_interval_s: float,
) -> Way:
    """Return the way through Ray: tasks on all CPUs, as nothing else is at work yet, and a path like a run's.

    Args:
        model: of the run.
        stage: the class of its actors.
        sizes: of its stages.
        watch: called while waiting; raises to stop.
        book: told of the receipt of each parcel that gives something.
        log_interval_s: between lines of the log.
    """

    def run(does: str, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        cpus = ray.cluster_resources().get("CPU", 1.0)
        at_once, each = max(1, int(cpus)), min(1.0, cpus)
        with Step(does, "tasks", len(arguments), log_interval_s) as step:
            done = run_tasks(task, arguments, at_once=at_once, watch=watch, num_cpus=each)
            return [result for _, result in step.each(done)]

    def path(job: EmbedJob, tasks: Sequence[ReadTask]) -> Iterator[Parcel]:
        rows = parcels([task.parcel() for task in tasks])
        rows = by_tasks(rows, read_given_stage, sizes.tasks["readers"], job=job)
        rows = by_actors(rows, stage, sizes.pools["encoders"], model)
        rows = by_tasks(rows, write_given_stage, sizes.tasks["writers"], job=job)
        return receipts(rows)

    def encode(job: EmbedJob, tasks: Sequence[ReadTask]) -> None:
        total = sum(task.n_parcels for task in tasks)
        with Step("encoding what repeats", "parcels", total, log_interval_s) as step:

            def booked(receipt: Parcel) -> None:
                step.advance()
                book(receipt)

            follow(lambda: path(job, tasks), booked, watch)

    return Way(run, encode)


def _batches(tasks: Sequence[ReadTask]) -> Iterator[tuple[ReadTask, ...]]:
    """Put tasks together until they have HASHED_PLACES parcels; one of more stays alone."""
    batch: list[ReadTask] = []
    for task in tasks:
        if batch and sum(other.n_parcels for other in batch) + task.n_parcels > HASHED_PLACES:
            yield tuple(batch)
            batch = []
        batch.append(task)
    if batch:
        yield tuple(batch)


def hash_parcels_task(job: EmbedJob, shared: Shared, tasks: Sequence[ReadTask]) -> dict[int, int]:
    """Write the texts of some parcels down that are not found near to them, HASHED_PLACES to a file.

    A parcel that cannot be read, or that takes its process down, has none: what is wrong with it is told when
    it is done.

    Returns:
        How many entries each file has, by the first of its places.
    """
    numbers = sorted({unit.place for task in tasks for unit in task.todo if unit.place is not None})
    groups = [numbers[at : at + HASHED_PLACES] for at in range(0, len(numbers), HASHED_PLACES)]
    known = {group[0]: _count(job, shared, group[0]) for group in groups}
    if all(count is not None for count in known.values()):
        return {place: count for place, count in known.items() if count is not None}
    counts: dict[int, int] = {}
    held: list[EntryArray] = []
    last = {group[-1]: group[0] for group in groups}
    with Attempt(job.ledger, f"find texts of {tasks[0].todo[0].unit.name} and more") as attempt:
        found = _texts_of(job, tasks) if attempt.total_deaths < MOST_DEATHS else iter(())
        for place, entries in _in_order(numbers, found):
            held.append(entries)
            if place in last:
                counts[last[place]] = _write_entries(job, shared, last[place], held)
                held = []
    return counts


def _in_order(
    numbers: Sequence[int], found: Iterator[tuple[int, EntryArray]]
) -> Iterator[tuple[int, EntryArray]]:
    """Yield the texts of each place, those that are not found without any."""
    waiting = iter(numbers)
    for place, entries in found:
        for number in waiting:
            if number == place:
                yield place, entries
                break
            yield number, entries[:0]
    for number in waiting:
        yield number, np.empty(0, ENTRY)


def _texts_of(job: EmbedJob, tasks: Sequence[ReadTask]) -> Iterator[tuple[int, EntryArray]]:
    """Yield the texts of parcels that no shard near to them has, in the order of their places."""
    for task in tasks:
        name = task.todo[0].unit.name
        earlier = Earlier(job)
        with Attempt(job.ledger, f"find texts of {name}") as attempt:
            if attempt.total_deaths >= LETHAL_DEATHS:
                logger.warning("unit %s: finding its texts killed the worker; it shares none", name)
                continue
            for found in read_parcels(task, job, attempt):
                place = found.task.place
                if found.error is not None or place is None:
                    continue
                _, pieces, _ = cut_parcel(found, job, attempt)
                hashes = hash_array(hash_texts(pieces.read))
                known = earlier.near([(part.unit, part.sources) for part in found.parts])
                yield place, entries_of(hashes[known.find(hashes) < 0], place)


def hash_shards_task(job: EmbedJob, shared: Shared, first: int, facts: Sequence[FileFact]) -> dict[int, int]:
    """Write the texts of some shards down; see `hash_parcels_task`."""
    known = _count(job, shared, first)
    if known is None:
        hashes = read_hashes(job.storage, job.root, facts)
        entries = [entries_of(some, first + n) for n, some in enumerate(hashes)]
        known = _write_entries(job, shared, first, entries)
    return {first: known}


def _count(job: EmbedJob, shared: Shared, place: int) -> int | None:
    """Return how many entries a file has; None if it is not there."""
    uri = join(job.root, shared.hashes_path(place))
    if job.storage.info(uri) is None:
        return None
    return int(section_sizes(job.storage, uri).sum()) // ENTRY.itemsize


def _write_entries(job: EmbedJob, shared: Shared, place: int, parts: Sequence[EntryArray]) -> int:
    uri = join(job.root, shared.hashes_path(place))
    if not job.storage.create(uri, pack_entries(parts)):
        # Another attempt found other texts, as a parcel of it could not be read: all count by what is there.
        return int(section_sizes(job.storage, uri).sum()) // ENTRY.itemsize
    return sum(len(part) for part in parts)


def share_task(job: EmbedJob, shared: Shared, bucket: int, sections: range, files: Sequence[int]) -> IdArray:
    """Find out who gives what to whom, of the texts in some sections of all files.

    Returns:
        The places that give something.
    """
    uri = join(job.root, shared.shared_path(bucket))
    if job.storage.info(uri) is None:
        with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
            uris = [join(job.root, shared.hashes_path(place)) for place in files]
            parts = list(pool.map(lambda uri: read_entries(job.storage, uri, sections), uris))
        sharing = share(np.concatenate([np.empty(0, ENTRY), *parts]), shared.n_shards)
        job.storage.create(uri, sharing.pack(shared.n_places))
    return giving_places(section_sizes(job.storage, uri))


def give_shard_task(job: EmbedJob, shared: Shared, place: int, fact: FileFact) -> None:
    """Leave what a shard gives; nothing of one that is damaged, which is named."""
    wanted = _gives(job, shared, place)
    known = KnownTexts.of((fact,), read_hashes(job.storage, job.root, (fact,)))
    at, table = take_known(job.storage, job.root, job.spec, known, wanted)
    given = table.append_column("text_hash", hash_column(wanted[at])) if len(at) else None
    _write_given(job, shared, place, given_schema(job.spec).empty_table() if given is None else given)


def read_given_stage(batch: pa.Table, job: EmbedJob) -> Iterator[pa.Table]:
    """Read parcels, and tokenise the texts that they give."""
    task = Parcel.from_batch(batch).task_as(ReadTask)
    with Attempt(job.ledger, f"read {_name(task.todo[0].unit.name)}") as attempt:
        for found in read_parcels(task, job, attempt):
            parcel = Parcel.of(_name(found.task.name), found.task)
            if found.error is not None:
                yield parcel.failed(found.error).to_batch()
                continue
            read = time.time()
            try:
                table, n_tokens = _make_given(found, job, attempt)
            except StorageError as error:
                yield parcel.failed(str(error)).to_batch()
                continue
            yield parcel.filled(
                table,
                read_started=found.started,
                read_s=read - found.started,
                tokenise_s=time.time() - read,
                tokens_encoded=n_tokens,
            ).to_batch()


def _make_given(found: Found, job: EmbedJob, attempt: Attempt) -> tuple[pa.Table, int]:
    """Return the texts that a parcel gives, with their tokens, and how many tokens that are."""
    texts, pieces, _ = cut_parcel(found, job, attempt)
    hashes = hash_texts(pieces.read)
    distinct, first = np.unique(hash_array(hashes), return_index=True)
    shared, place = job.shared, found.task.place
    gives = distinct[:0] if shared is None or place is None else _gives(job, shared, place)
    wanted = np.sort(first[np.isin(distinct, gives)]).astype(np.int64)
    done, tokens, _ = tokenise_pieces(found, texts, pieces, wanted, job, attempt)
    table = pa.table(
        {
            "text_hash": hashes.take(pa.array(done)),
            "n_tokens": pa.array(tokens.result_lengths.astype(np.int32)),
            "truncated": pa.array(tokens.result_truncated),
        }
    )
    table = with_faults(table, {})
    return with_tokens(table, np.arange(len(done), dtype=np.int64), tokens), int(tokens.lengths.sum())


def write_given_stage(batch: pa.Table, job: EmbedJob) -> Iterator[pa.Table]:
    """Leave what a parcel gives, and send the driver a receipt."""
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        yield batch
        return
    place = parcel.task_as(UnitsTask).place
    with Attempt(job.ledger, f"write {parcel.name}") as attempt:
        if attempt.total_deaths >= job.max_attempts:
            yield parcel.failed(f"its writer died {attempt.total_deaths} times").to_batch()
            return
        started = time.time()
        good = parcel.table.filter(pc.is_null(parcel.table["reason"]))
        try:
            if job.shared is not None and place is not None and len(good):
                _write_given(job, job.shared, place, good)
        except StorageError as error:
            yield parcel.failed(str(error)).to_batch()
            return
    yield parcel.filled(None, write_s=time.time() - started, written=time.time()).to_batch()


def _gives(job: EmbedJob, shared: Shared, place: int) -> HashArray:
    """Return the hashes of the texts that a place gives."""
    uris = [join(job.root, shared.shared_path(bucket)) for bucket in range(shared.n_buckets)]
    return np.concatenate([read_gives(job.storage, uri, place) for uri in uris])


def _write_given(job: EmbedJob, shared: Shared, place: int, table: pa.Table) -> None:
    # What another attempt left is as good: on a GPU its last bits may differ.
    job.storage.create(join(job.root, shared.given_path(place)), pack_given(table, job.spec))


def _name(unit: str) -> str:
    """Return the name of a parcel of texts that are given, beside that of its unit's own."""
    return f"{unit} (shared)"
