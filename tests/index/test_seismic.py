"""Seismic against exact lists: what it finds, that scores are theirs, and when it is not taken."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from bge_ray.errors import IndexBuildError, InstallationError
from bge_ray.index import seismic
from bge_ray.index.lists import Lists, blocks_of, invert, on_disk, search_lists
from bge_ray.index.seismic import LADDER, SeismicIndex, choose_pruning
from bge_ray.index.topk import NO_RESULT, Results, merge_topk
from bge_ray.index.tune import measure_recall
from bge_ray.records.arrays import SparseRows
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.ids import CHUNK_BITS, IdArray, first_ids
from bge_ray.records.sparse import Pruning, SparseChoice

pytestmark = pytest.mark.long

PASSAGES, QUERIES = 2_000, 60
VOCABULARY = 250_002


def weights(rng: np.random.Generator, rows: int, tokens: int) -> SparseRows:
    """Rows of tokens whose frequencies fall as words' do; the rarer a token, the more it weighs."""
    drawn = np.minimum(rng.zipf(1.2, (rows, tokens)), VOCABULARY - 1)
    distinct = [np.unique(row) for row in drawn]
    indices = np.concatenate(distinct)
    values = rng.gamma(2.0, 0.06, len(indices)) * (0.2 + np.log(indices) / 5)
    return SparseRows(
        np.cumsum([0, *map(len, distinct)]), indices.astype(np.int32), values.astype(np.float16)
    )


def ids_of(*, chunks: bool) -> IdArray:
    numbers = np.arange(PASSAGES)
    return (numbers // 3 << CHUNK_BITS) + numbers % 3 if chunks else numbers << CHUNK_BITS


@dataclass(frozen=True)
class Held:
    """What an actor holds: several blocks of lists, and the index of them."""

    blocks: list[Lists]
    index: SeismicIndex
    per_row: bool

    @classmethod
    def of(cls, rows: SparseRows, numbers: range, *, chunks: bool = False) -> "Held":
        ids = ids_of(chunks=chunks)
        parts = [np.array(numbers[at : at + 600]) for at in range(0, len(numbers), 600)]
        blocks = [on_disk(invert(rows[part], ids[part])) for part in parts]
        return cls(blocks, SeismicIndex(blocks, 1), chunks)

    def exactly(self, queries: SparseRows, k: int) -> Results:
        return search_lists(queries, self.blocks, k, per_row=self.per_row)

    def search(self, queries: SparseRows, k: int, how: Pruning) -> Results:
        return self.index.search(queries, k, how, per_row=self.per_row)


@pytest.fixture(scope="module")
def rows() -> SparseRows:
    return weights(np.random.default_rng(1), PASSAGES, 40)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "chunks"])
def held(request: pytest.FixtureRequest, rows: SparseRows) -> Held:
    return Held.of(rows, range(PASSAGES), chunks=request.param)


@pytest.fixture(scope="module")
def halves(rows: SparseRows) -> list[Held]:
    """Two actors with half of the passages each."""
    return [Held.of(rows, range(PASSAGES // 2)), Held.of(rows, range(PASSAGES // 2, PASSAGES))]


@pytest.fixture(scope="module")
def queries() -> SparseRows:
    return weights(np.random.default_rng(2), QUERIES, 12)


def test_it_finds_most_of_the_best_and_scores_are_the_exact_ones(held: Held, queries: SparseRows) -> None:
    every_score, every_id = search_lists(queries, held.blocks, PASSAGES)
    _, truth = held.exactly(queries, 10)
    recalls = []
    for pruning in LADDER:
        scores, found = held.search(queries, 10, pruning)
        recalls.append(measure_recall(found, truth, 10).value)
        for number in range(QUERIES):
            known = dict(zip(every_id[number].tolist(), every_score[number].tolist(), strict=True))
            assert [known[name] for name in found[number].tolist()] == scores[number].tolist()
            assert np.lexsort((found[number], -scores[number])).tolist() == list(range(10))
            assert not held.per_row or len(set(first_ids(found[number]).tolist())) == 10
    assert recalls[0] >= 0.8
    assert recalls[-1] >= 0.99


def test_the_same_lists_make_the_same_index(halves: list[Held], queries: SparseRows) -> None:
    first = halves[0].search(queries, 100, LADDER[0])
    again = SeismicIndex(halves[0].blocks, 2).search(queries, 100, LADDER[0])
    np.testing.assert_array_equal(again[1], first[1])
    np.testing.assert_array_equal(again[0], first[0])


def test_a_query_that_finds_fewer_than_asked_is_searched_exactly(halves: list[Held]) -> None:
    """Tokens of one passage, of none, no token; and among them a query that finds enough."""
    held = halves[0]
    rare = [int(token) for block in held.blocks for token in block.tokens[np.diff(block.offsets) == 1][-2:]]
    asked = [rare[:1], [VOCABULARY + 7], [], [1, 2, 3], rare]
    tokens = [np.unique(np.array(some, np.int32)) for some in asked]
    count = sum(map(len, tokens))
    offsets = np.cumsum([0, *map(len, tokens)])
    queries = SparseRows(offsets, np.concatenate(tokens), np.full(count, 0.5, np.float32))
    found, truth = held.search(queries, 20, LADDER[0]), held.exactly(queries, 20)
    few = (truth[1] == NO_RESULT).any(axis=1)
    assert few.tolist() == [True, True, True, False, True]
    np.testing.assert_array_equal(found[1][few], truth[1][few])
    np.testing.assert_array_equal(found[0][few], truth[0][few])
    assert (found[1][3] != NO_RESULT).all()


def test_passages_without_a_token_are_passed_over() -> None:
    """Seismic leaves them out of its numbering."""
    rows = SparseRows(np.array([0, 0, 1, 1, 2]), np.array([4, 4], np.int32), np.array([0.5, 1.0], np.float16))
    blocks = list(blocks_of([(rows, np.arange(4) << CHUNK_BITS)]))
    asked = SparseRows(np.array([0, 1]), np.array([4], np.int32), np.ones(1, np.float32))
    _, ids = SeismicIndex(blocks, 1).search(asked, 2, LADDER[0])
    assert ids.tolist() == [[3 << CHUNK_BITS, 1 << CHUNK_BITS]]


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_find(n: int) -> None:
    nothing = SparseRows(np.zeros(n + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float16))
    blocks = list(blocks_of([(nothing, np.arange(n))] if n else []))
    asked = SparseRows(np.array([0, 1]), np.array([4], np.int32), np.ones(1, np.float32))
    _, ids = SeismicIndex(blocks, 1).search(asked, 3, LADDER[0])
    assert (ids == NO_RESULT).all()
    with pytest.raises(IndexBuildError, match="k is 0"):
        SeismicIndex(blocks, 1).search(asked, 0, LADDER[0])


def test_more_tokens_than_its_small_kind_knows(
    halves: list[Held],
    queries: SparseRows,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(seismic, "_SMALL_TOKENS", 0)
    large = SeismicIndex(halves[0].blocks, 1)
    _, truth = halves[0].exactly(queries, 10)
    assert measure_recall(large.search(queries, 10, LADDER[-1])[1], truth, 10).value >= 0.97
    assert capfd.readouterr().out == ""  # Seismic would print what it builds
    print("here")
    assert capfd.readouterr().out == "here\n"


Asked = Callable[[SparseRows, int, Pruning | None], Results]


@pytest.fixture
def two_actors(halves: list[Held]) -> Asked:
    """Ask both, as a search does."""

    def search(queries: SparseRows, k: int, how: Pruning | None) -> Results:
        if how is None:
            return merge_topk([held.exactly(queries, k) for held in halves], k)
        return merge_topk([held.search(queries, k, how) for held in halves], k)

    return search


def test_the_cheapest_that_reaches_the_target_is_taken(two_actors: Asked, queries: SparseRows) -> None:
    _, truth = two_actors(queries, 10, None)
    recalls = [measure_recall(two_actors(queries, 10, how)[1], truth, 10) for how in LADDER]
    for target in (0.5, recalls[1].value, recalls[-1].value):
        choice = choose_pruning(two_actors, queries, 10, target, 1.5)
        first = next(n for n, recall in enumerate(recalls) if recall.value >= target)
        assert choice.taken
        assert (choice.pruning, choice.recall) == (LADDER[first], recalls[first])
        assert (choice.queries, choice.build_s, choice.target) == (QUERIES, 1.5, target)
        assert min(choice.exact_ms, choice.approximate_ms) > 0
        assert from_json(SparseChoice, to_json(choice)) == choice
        # More results than were measured are looked for exactly.
        assert [choice.for_results(k) for k in (1, 10, 11)] == [choice.pruning, choice.pruning, None]


def test_where_none_reaches_the_target_the_exact_lists_are_taken(
    two_actors: Asked, queries: SparseRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seismic, "LADDER", (Pruning(1, 1.0), Pruning(2, 1.0)))
    choice = choose_pruning(two_actors, queries, 100, 0.999, 0.0)
    assert not choice.taken
    assert choice.for_results(100) is None
    assert choice.pruning == Pruning(2, 1.0)
    assert choice.recall is not None
    assert choice.recall.low < choice.recall.value < 0.999
    assert "on 60 queries of the run" in str(choice)


def test_without_a_query_that_has_a_result_nothing_is_claimed(two_actors: Asked) -> None:
    nothing = SparseRows(np.zeros(4, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
    for some in (nothing, nothing[np.arange(0)]):
        choice = choose_pruning(two_actors, some, 10, 0.9, 0.0)
        assert (choice.taken, choice.recall, choice.for_results(10)) == (False, None, None)
        assert str(choice) == f"none of {len(some)} queries has a result"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seismic", None)
    with pytest.raises(InstallationError, match=r"pip install 'bge-ray\[seismic\]'.*search.sparse to exact"):
        seismic.package()


def test_another_module_of_that_name_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seismic", sys)
    with pytest.raises(InstallationError, match="is not that of pyseismic-lsr"):
        seismic.package()
