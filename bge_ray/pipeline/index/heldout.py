"""Rows that a graph is built without while its recall is measured.

A row that is a node of the graph has been searched for before, when it was inserted: as a query it says
little of the queries to come. So some rows of each shard stay out of the graph, are asked for its nearest
neighbours, and are inserted when the effort is known. Which ones follows from the shard alone, so that a
shard that comes or goes changes no other graph.
"""

from collections.abc import Sequence

import numpy as np

from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import IdArray

# Of the rows: enough queries in 20,000 of them, and so few that the graph is as good as whole.
SHARE = 0.05


def held_rows(group: Sequence[FileFact]) -> list[IdArray]:
    """Return the rows of each shard, ascending, that stay out of the graph over all; never all rows."""
    chosen = [_chosen(fact) for fact in group]
    everything = sum(map(len, chosen)) == sum(fact.rows for fact in group)
    return [rows[:0] for rows in chosen] if everything else chosen


def _chosen(fact: FileFact) -> IdArray:
    rng = np.random.default_rng(int(fact.sha256[:16], 16))
    return np.flatnonzero(rng.random(fact.rows) < SHARE)
