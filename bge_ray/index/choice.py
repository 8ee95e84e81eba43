"""Which index `auto` means: the code that fits, and how many candidates must be scored again with it.

What a code recalls was measured on real vectors, by `tools/codes.py` (docs/index.md has the whole table):
with all lists probed, so it is what the code allows at most, and probing decides the rest.
"""

from dataclasses import dataclass

from bge_ray.errors import IndexBuildError
from bge_ray.index.factory import FLAT_MAX_ROWS, Metric, check_factory, choose_nlist, index_bytes

# Candidates for each result that are scored again exactly; 1 is none.
FACTORS = (1, 2, 4, 10, 20)
# Results a query that were measured.
DEPTHS = (10, 100)


@dataclass(frozen=True)
class Code:
    """A code of an IVF index; ``recall`` has a row for each of DEPTHS, with a value for each of FACTORS."""

    name: str
    rotated: bool
    recall: tuple[tuple[float, ...], ...]

    def factory(self, nlist: int, dim: int) -> str:
        """Return the factory string."""
        return f"RR{dim},IVF{nlist},{self.name}" if self.rotated else f"IVF{nlist},{self.name}"


# Largest first.
CODES = (
    Code("SQ8", rotated=False, recall=((0.9934, 1.0, 1.0, 1.0, 1.0), (0.9949, 1.0, 1.0, 1.0, 1.0))),
    Code("RaBitQ4", rotated=True, recall=((0.9545, 0.9999, 1.0, 1.0, 1.0), (0.9636, 1.0, 1.0, 1.0, 1.0))),
    Code(
        "RaBitQ2",
        rotated=True,
        recall=((0.875, 0.9891, 0.9992, 1.0, 1.0), (0.8814, 0.9948, 0.9996, 1.0, 1.0)),
    ),
    Code(
        "RaBitQ",
        rotated=True,
        recall=((0.7548, 0.9238, 0.9782, 0.9935, 0.9986), (0.7449, 0.92, 0.9852, 0.9982, 0.9996)),
    ),
)


@dataclass(frozen=True)
class Wish:
    """What an index is for: so many vectors, within so many bytes, with a recall at k."""

    n_vectors: int
    dim: int
    memory_bytes: int
    target: float
    k: int

    @property
    def least_ceiling(self) -> float:
        """What a code must allow at least: half of what may be lost is left to the lists not probed."""
        return 1 - (1 - self.target) / 2


@dataclass(frozen=True)
class Choice:
    """A factory string with its estimated bytes, and the candidates that searches score again for k results.

    ``recall`` is what the code allows at most, as measured; ``others`` say what the alternatives would be.
    """

    factory: str
    bytes: int
    rescore: int
    recall: float
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        rescored = f", {self.rescore:,} candidates rescored" if self.rescore else ""
        words = (
            f"{self.factory}: {self.bytes / 1e9:,.2f} GB{rescored}, recall at most about {self.recall:.3f}"
        )
        return f"{words}; instead of {'; '.join(self.others)}" if self.others else words


def choose(wish: Wish, rescore: int | None) -> Choice:
    """Choose the largest code that fits, with the fewest candidates to score again that reach the target.

    Args:
        wish: what is asked for.
        rescore: the candidates that searches will score again for ``wish.k`` results; None to choose them.

    Returns:
        The choice. Where no code reaches the target however much is rescored, the best of those that fit.

    Raises:
        IndexBuildError: nothing fits into the memory, or nothing that does reaches the target with the
            ``rescore`` that was asked for.
    """
    options = _options(wish, rescore)
    fitting = [option for option in options if option.bytes <= wish.memory_bytes]
    good = [option for option in fitting if option.recall >= wish.least_ceiling]
    listed = "; ".join(map(str, options))
    if not fitting:
        raise IndexBuildError(
            f"index.factory auto: no code of {wish.n_vectors:,} vectors fits into index.memory_bytes "
            f"{wish.memory_bytes:,} ({listed}): raise it to what the machines of a search have together, or "
            "name a factory"
        )
    if not good and rescore is not None:
        raise IndexBuildError(
            f"index.factory auto: no code that fits into index.memory_bytes {wish.memory_bytes:,} reaches "
            f"index.recall_target {wish.target:g} with {rescore:,} candidates rescored ({listed}): leave "
            "index.rescore and search.rescore to null, raise index.memory_bytes, or name a factory"
        )
    chosen = good[0] if good else max(fitting, key=lambda option: option.recall)
    others = tuple(str(option) for option in options if option is not chosen)
    return Choice(chosen.factory, chosen.bytes, chosen.rescore, chosen.recall, others)


def _options(wish: Wish, rescore: int | None) -> list[Choice]:
    """Return what there is, the largest first."""
    found: list[tuple[str, float, int]] = []
    flat = ("IDMap2,Flat", "IDMap2,SQfp16") if wish.n_vectors <= FLAT_MAX_ROWS else ()
    lists = choose_nlist(wish.n_vectors)
    found += [(factory, 1.0, rescore or 0) for factory in flat]
    for code in CODES:
        factor = _least_factor(code, wish) if rescore is None else max(1, rescore // wish.k)
        again = (factor * wish.k if factor > 1 else 0) if rescore is None else rescore
        found.append((code.factory(lists, wish.dim), _recall(code, wish.k, factor), again))
    sizes = [
        index_bytes(check_factory(factory, wish.dim, Metric.L2), wish.n_vectors) for factory, *_ in found
    ]
    return [
        Choice(factory, size, again, recall)
        for (factory, recall, again), size in zip(found, sizes, strict=True)
    ]


def _least_factor(code: Code, wish: Wish) -> int:
    return next((f for f in FACTORS if _recall(code, wish.k, f) >= wish.least_ceiling), FACTORS[-1])


def _recall(code: Code, k: int, factor: int) -> float:
    """Return what was measured nearest to it, the lower of two."""
    place = max(i for i, measured in enumerate(FACTORS) if measured <= max(1, factor))
    near = {
        max((d for d in DEPTHS if d <= k), default=DEPTHS[0]),
        min((d for d in DEPTHS if d >= k), default=DEPTHS[-1]),
    }
    return min(row[place] for depth, row in zip(DEPTHS, code.recall, strict=True) if depth in near)
