"""Whether weights are searched approximately: measured on queries of the run before the first is answered."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.actor import ActorHandle

from bge_ray.index.seismic import choose_pruning
from bge_ray.index.topk import Results
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.tasks import wait_for
from bge_ray.pipeline.index.searchers import search_all
from bge_ray.pipeline.runs.groups import GroupTask, GroupUnit
from bge_ray.records.arrays import SparseRows, sparse_rows
from bge_ray.records.model import SPARSE
from bge_ray.records.sparse import Pruning, SparseChoice
from bge_ray.report.advice import advise_sparse

logger = logging.getLogger(__name__)

# Of a run; its interval is three hundredths wide at a recall of 0.95. Of no more groups, each of which is
# read for it and encoded by itself.
SAMPLE, SAMPLE_GROUPS = 200, 10
SEED = 0


def sample_of(groups: Sequence[GroupTask]) -> tuple[GroupTask, ...]:
    """Return tasks for some of the queries to do: the same for the same groups."""
    rng = np.random.default_rng(SEED)
    chosen = np.sort(rng.choice(len(groups), min(SAMPLE_GROUPS, len(groups)), replace=False))
    some = [groups[i] for i in chosen]
    owner = np.repeat(np.arange(len(some)), [group.n_rows for group in some])
    rows = np.concatenate(
        [np.arange(unit.first_row, unit.first_row + unit.n_rows) for group in some for unit in group.todo]
    )
    drawn = np.sort(rng.choice(len(rows), min(SAMPLE, len(rows)), replace=False))
    tasks = []
    for number, group in enumerate(some):
        units = tuple(GroupUnit(int(row), 1, "") for row in rows[drawn[owner[drawn] == number]])
        if units:
            tasks.append(GroupTask(group.number, group.uri, units))
    return tuple(tasks)


class EncodedSample:
    """Collects the weights of a sample's queries from the receipts of a data path that encodes them."""

    def __init__(self) -> None:
        self._columns: list[pa.ChunkedArray] = []

    def take(self, receipt: Parcel) -> None:
        """Take the queries of a group that could be encoded; the run itself ends by what is given up."""
        if receipt.table is None:
            logger.warning(
                "the recall of weights is measured without group %s: %s", receipt.name, receipt.error
            )
            return
        able = receipt.table.filter(pc.is_null(receipt.table["reason"]))
        self._columns.append(able[SPARSE])

    def queries(self) -> SparseRows:
        """Return them all."""
        chunks = [chunk for column in self._columns for chunk in column.chunks]
        if not chunks:
            return SparseRows(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
        return sparse_rows(pa.chunked_array(chunks))


def settle_sparse(
    searchers: Sequence[ActorHandle], queries: SparseRows, k: int, target: float, watch: Callable[[], None]
) -> SparseChoice:
    """Make the indexes, and find the cheapest way to search them that reaches a target; or none, and say so.

    Args:
        searchers: which hold all vectors together.
        queries: of the run.
        k: results a query.
        target: recall@k of all searchers together.
        watch: called while they work.

    Raises:
        StorageError, IndexBuildError: a shard is missing or damaged.
        InstallationError: Seismic is missing where they run.
    """
    build_s = max(wait_for([searcher.build.remote() for searcher in searchers], watch))

    def search(some: SparseRows, fetched: int, how: Pruning | None) -> Results:
        return search_all(searchers, some, fetched, how, watch)

    choice = choose_pruning(search, queries, k, target, build_s)
    if choice.taken:
        logger.info("weights are searched approximately: %s", choice)
        return choice
    wait_for([searcher.drop.remote() for searcher in searchers], watch)
    logger.warning("%s", advise_sparse(choice))
    return choice
