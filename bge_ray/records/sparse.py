"""How the weights of tokens are searched where an approximate search is asked for, and what that finds."""

from dataclasses import dataclass

from bge_ray.records.index import Recall


@dataclass(frozen=True)
class Pruning:
    """What a search by Seismic leaves out.

    Only the ``query_cut`` largest weights of a query choose lists; of a list a block is looked into if its
    summary promises more than the worst of the k best so far divided by ``heap_factor``.
    """

    query_cut: int
    heap_factor: float


@dataclass(frozen=True)
class SparseChoice:
    """How the weights of tokens are searched in a run that asked for ``search.sparse: approximate``.

    ``recall`` was measured on a sample of ``queries`` of the run, all shards together, against the exact
    lists; None where no query of the sample has a result. Where ``taken``, the run searched with ``pruning``,
    the cheapest that reached ``target``; else none reached it, the run searched exactly, and ``recall`` is
    what the dearest found. Milliseconds are of a query of the sample, ``build_s`` is what making the
    indexes took.
    """

    target: float
    taken: bool
    pruning: Pruning
    queries: int
    recall: Recall | None
    exact_ms: float
    approximate_ms: float
    build_s: float

    def for_results(self, k: int) -> Pruning | None:
        """Return how to search for k results; None: exactly, also where more is asked than was measured."""
        measured = 0 if self.recall is None else self.recall.k
        return self.pruning if self.taken and k <= measured else None

    def __str__(self) -> str:
        """Say what was measured."""
        if self.recall is None:
            return f"none of {self.queries} queries has a result"
        found = self.recall
        return (
            f"recall@{found.k} {found.value:.4f} ({found.low:.4f} to {found.high:.4f}) on {self.queries} "
            f"queries of the run, {self.approximate_ms:.2f} ms a query and {self.exact_ms:.2f} ms exactly"
        )
