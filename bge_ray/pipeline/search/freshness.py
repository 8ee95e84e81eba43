"""Whether an index holds what its data set does."""

import logging

from bge_ray.errors import DatasetMismatchError
from bge_ray.pipeline.runs.source import Source
from bge_ray.records.index import IndexDescription

logger = logging.getLogger(__name__)

# What needs no index at all.
_EXACTLY = "search exactly (search.exact of bge-ray search)"


def check_index(index: IndexDescription, source: Source, *, allowed: bool, way_out: str) -> None:
    """Refuse an index of other vectors, and one that lacks some of them, unless such a one is ``allowed``.

    One that has more than the data set is searched: what is gone is dropped, and its places are filled.

    Args:
        index: of the data set.
        source: the data set.
        allowed: whether what the index holds may be searched although it is not all.
        way_out: how to ask for that, for the message.

    Raises:
        DatasetMismatchError: says what does not fit, and the ways out.
    """
    where = f"output.uri {source.root}"
    if index.vector_fingerprint != source.spec.vector_fingerprint or index.dim != source.spec.model.dim:
        raise DatasetMismatchError(
            f"{where}: its index was built from vectors of another model or other settings; "
            f"run index.py again, or {_EXACTLY}"
        )
    lacking = set(index.lacks(source.shard_hashes))
    facts = [m.embeddings for m in source.manifest.shards if m.embeddings is not None]
    rows = sum(fact.rows for fact in facts if fact.sha256 in lacking)
    if lacking:
        message = (
            f"{where}: {rows:,} of its {source.manifest.vectors:,} vectors ({len(lacking):,} of "
            f"{len(facts):,} shards) are not in its index, which is older, and would not be found"
        )
        if not allowed:
            raise DatasetMismatchError(
                f"{message}; run index.py to renew it, {_EXACTLY}, or {way_out} to search what it holds"
            )
        logger.warning("%s; stale_index allows it", message)
    elif index.ntotal != source.manifest.vectors:
        logger.warning(
            "%s: its index holds %d vectors, %d of them gone from the data set; run index.py to renew it",
            where,
            index.ntotal,
            index.ntotal - source.manifest.vectors,
        )
