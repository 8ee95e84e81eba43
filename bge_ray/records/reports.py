"""What report.json of a job holds. Reruns and other jobs read `Report`, which all jobs' reports are.

``rows`` are what the job is about: passages (embed), queries (search, mine, train), pairs (rerank), vectors
(index), tensors (merge).
All times are seconds; moments are Unix seconds.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from bge_ray.records.canonical import from_json
from bge_ray.records.dataset import FileFact
from bge_ray.records.index import IndexDescription, Recall, Shortfall
from bge_ray.records.model import EMBEDDING, ModelSpec
from bge_ray.records.sparse import SparseChoice

R = TypeVar("R", bound="Report")

REPORT_FORMAT_VERSION = 2
# In the order in which they follow each other.
PHASES = ("launch", "plan", "start", "work", "finish")


@dataclass(frozen=True)
class RejectedRow:
    """An example of a row that was left out; what names it depends on the job."""

    reason: str
    detail: str
    query_id: str | None = None
    passage_id: str | None = None
    uri: str | None = None
    row: int | None = None


@dataclass(frozen=True)
class Lengths:
    """How many texts have up to so many tokens; the last of ``counts`` are longer than every edge."""

    upper_edges: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Throughput:
    """Tokens and rows a second in bins of equal width, from the start of the run on."""

    bin_s: float = 0.0
    tokens_per_s: tuple[float, ...] = ()
    rows_per_s: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What any job did.

    ``key`` names all that decides the outcome: a rerun with the same key and a report that is
    ``complete`` has nothing to do while ``files`` are there (paths below the folder of the report where they
    lie there, URIs elsewhere; of an embed run its manifest, which names the others).

    Rows and units are those that this run did; what earlier runs had done is counted by the fields of the
    job. ``phase_s`` adds up to ``wall_s``, which begins with the process where a command runs one job.
    ``utilisation`` and ``waiting`` are shares of the time that the model's actors had, ``steady_s`` long.
    """

    job: str
    run_id: str
    key: str
    complete: bool
    outcome: str
    started: float
    wall_s: float
    startup_s: float
    steady_s: float
    phase_s: dict[str, float]
    stage_s: dict[str, float]
    units_planned: int
    units_done: int
    rows_planned: int
    rows_in: int
    rows_out: int
    rows_rejected: int
    rejected_reasons: dict[str, int]
    rejected_examples: tuple[RejectedRow, ...]
    failures: tuple[str, ...]
    files: tuple[FileFact, ...]
    bytes_in: int
    bytes_out: int
    tokens: int
    truncated: int
    padding_waste: float
    memory_splits: int
    rows_per_s: float
    tokens_per_s: float
    device: str
    devices: float
    workers: dict[str, int]
    utilisation: float
    waiting: float
    device_hours: float
    price_per_hour: float | None
    cost: float | None
    cost_per_million_tokens: float | None
    throughput: Throughput
    settings: dict[str, Any]
    advice: tuple[str, ...] = ()
    format_version: int = REPORT_FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class EmbedReport(Report):
    """Of an embed run; ``plan`` is the number of its plan.

    ``removed_uris`` are some of the ``objects_removed`` that left the corpus, and with it the data set.
    ``tokenizer`` says what a person should know of how this run read texts; None if there is nothing.
    ``output_bytes`` are bytes a row of each output, before Parquet compresses them.

    ``tokens`` are those of all rows that came out, ``tokens_encoded`` those that went through the model, and
    ``tokens_reused`` those of vectors that were there already; rates and costs are of ``tokens_encoded``.
    ``rows_reused`` are rows none of whose vectors was encoded for them; ``vectors_reused`` says where vectors
    came from: object (a shard of an earlier state of their object, or of one that it may be a copy of),
    corpus (any other shard of an earlier state), repeated (the same text elsewhere in what this run encoded).
    ``cost_saved`` is what the device would have taken for them, None if nobody knows.
    """

    output: str
    corpus: str
    plan: int
    model: ModelSpec
    vector_fingerprint: str
    readers_busy: float
    lengths: Lengths
    objects_removed: int
    rows_removed: int
    removed_uris: tuple[str, ...]
    tokenizer: str | None = None
    output_bytes: dict[str, float] = field(default_factory=dict)
    tokens_encoded: int = 0
    rows_reused: int = 0
    tokens_reused: int = 0
    vectors_reused: dict[str, int] = field(default_factory=dict)
    cost_saved: float | None = None


@dataclass(frozen=True, kw_only=True)
class IndexReport(Report):
    """Of an index build; ``index`` is the content of index.json, None if it came to none."""

    output: str
    index: IndexDescription | None


@dataclass(frozen=True)
class SearchedIndex:
    """The index that a search used, and the effort that it was asked with.

    ``recall`` was measured with ``tuned_effort``, for ``tuned_k`` results, of ``tuned_rescore`` candidates
    scored again for as many results as this search asked for. ``lacking_shards`` of the data set are not
    in it. ``shortfall`` is what this search misses of the index's own target.
    """

    factory: str
    kind: str
    ntotal: int
    parameter: str | None
    effort: int
    tuned_effort: int
    rescore: int
    tuned_k: int
    tuned_rescore: int
    lacking_shards: int
    recall: dict[str, Recall]
    shortfall: Shortfall | None = None


@dataclass(frozen=True)
class Scoring:
    """What the rerankers of a run did; counts are of the whole run, rates of what this run did."""

    model: dict[str, Any]
    pairs_out: int
    pairs_rejected: int
    pair_tokens: int
    truncated_pairs: int
    padding_waste: float
    pair_tokens_per_s: float
    num_rerankers: int
    utilisation: float


@dataclass(frozen=True, kw_only=True)
class SearchReport(Report):
    """Of a search; ``index`` is None where it was exact, ``scoring`` where nothing was reranked.

    ``found_by`` are the outputs by which candidates were found, and ``way`` says for a person what was done.
    ``sparse`` is how weights of tokens were searched where that was not asked to be exact. ``filter`` is the
    one of all queries, and ``passing`` how many vectors pass it, where this run asked; of
    ``filtered_queries``, which have it or one of their own, ``few_passing`` have filters that fewer passages
    pass than were asked for, and for ``compared_all`` of them all that pass were compared.

    ``units`` and all counts of queries, results and tokens are of the published run, earlier units included.
    ``without_trec`` says why there is no run.trec, if so.
    """

    units: int
    without_trec: tuple[str, ...]
    queries: str
    dataset: str
    model: ModelSpec
    index: SearchedIndex | None
    k: int
    queries_in: int
    queries_out: int
    results: int
    unknown_ids: int
    missing_results: int
    doubled_passages: int
    refilled_queries: int
    query_tokens: int
    truncated_queries: int
    scoring: Scoring | None
    found_by: tuple[str, ...] = (EMBEDDING,)
    way: str = ""
    filter: str | None = None
    passing: int | None = None
    filtered_queries: int = 0
    few_passing: int = 0
    compared_all: int = 0
    sparse: SparseChoice | None = None


@dataclass(frozen=True, kw_only=True)
class RerankReport(Report):
    """Of a rerank run; ``lists_rejected`` are candidate lists left out whole.

    ``units`` and all counts of queries and pairs are of the published run, earlier units included.
    ``without_trec`` says why there is no run.trec, if so.
    """

    units: int
    without_trec: tuple[str, ...]
    candidates: str
    queries: int
    pairs_in: int
    pairs_out: int
    lists_rejected: int
    scoring: Scoring


@dataclass(frozen=True)
class MinedExample:
    """A result of a query, what became of it, and the query's best positive beside it; texts are cut."""

    verdict: str
    query_id: str
    query: str
    positive_id: str
    positive: str
    positive_score: float
    passage_id: str
    passage: str
    score: float
    cosine: float | None
    overlap: float | None


@dataclass(frozen=True)
class Gaps:
    """How many negatives are so far below the lowest positive; the last of ``counts`` beyond every edge."""

    upper_edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MineReport(Report):
    """Of a mining run; all counts are of the published files, earlier units included.

    ``verdicts`` counts what became of each result and positive. Of the positives, ``positives_unknown`` are
    not in the data set, and ``positives_beyond`` were not among the results. ``queries_short`` have fewer
    negatives than asked for, ``queries_unjudged`` no judgement at all; those are not among ``queries_in``.
    """

    units: int
    queries: str
    dataset: str
    model: ModelSpec
    exact: bool
    teacher: str | None
    queries_in: int
    queries_out: int
    queries_short: int
    queries_unjudged: int
    positives_unknown: int
    positives_beyond: int
    negatives: int
    tuples: int
    verdicts: dict[str, int]
    examples: tuple[MinedExample, ...]
    gaps: Gaps


@dataclass(frozen=True)
class MergedModel:
    """A model that went into a merged one: the hash of its files, its weight, and its loss on examples."""

    name: str
    revision: str | None
    weights_sha256: str
    weight: float
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class MergeReport(Report):
    """Of a merge of models, whose rows are tensors; ``parameters`` counts the numbers of the merged model."""

    output: str
    models: tuple[MergedModel, ...]
    examples: int
    parameters: int


@dataclass(frozen=True)
class TrainStep:
    """The mean loss and the learning rate of some steps, of which this is the last."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class HeldOut:
    """A figure of a model by held-out queries: its mean, and the interval of it at 95 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class HeldOutFigures:
    """MRR@10 by ``queries`` before (None: a head that was random then) and after a training.

    ``difference`` is of the two, with its interval, and ``p_value`` how likely one as large is by chance.
    """

    queries: int
    before: HeldOut | None
    after: HeldOut
    difference: HeldOut | None
    p_value: float | None


@dataclass(frozen=True, kw_only=True)
class TrainReport(Report):
    """Of a training, whose rows are queries that were trained on, each as often as it was.

    ``examples`` are in the data, ``left_out`` more have the text of a held-out query. ``restarts`` counts how
    often this run's workers were begun anew; ``resumed_from`` is the step that it began with.
    """

    output: str
    kind: str
    model: ModelSpec
    fresh_head: bool
    data: str
    data_sha256: str
    examples: int
    left_out: int
    held_out: str | None
    steps: int
    batch_queries: int
    restarts: int
    resumed_from: int
    curve: tuple[TrainStep, ...]
    figures: HeldOutFigures | None


@dataclass(frozen=True)
class Contestant:
    """What was measured: an encoder, a reranker, or both; ``revision`` is the folder of its results.

    ``search`` says how its retrieval tasks were searched, None of a reranker alone. ``dtype`` and
    ``max_length`` are those of the encoder, or of a reranker alone. ``note`` says what a person should know.
    """

    name: str
    revision: str
    model: str | None
    reranker: str | None
    search: str | None
    dtype: str
    max_length: int
    note: str | None = None


@dataclass(frozen=True)
class TaskScore:
    """Main score of a contestant on a task, and how long it took, as mteb reckons both."""

    model: str
    task: str
    type: str
    score: float
    seconds: float | None
    mteb_version: str | None


@dataclass(frozen=True)
class Mean:
    """A mean over tasks in per cent, beside the published one; None where a task is missing, or it is not.

    ``type`` is the kind of the tasks, None of a mean over all; ``tasks`` how many they are, ``done`` how many
    have a score.
    """

    name: str
    model: str
    type: str | None
    tasks: int
    done: int
    score: float | None
    published: float | None


@dataclass(frozen=True, kw_only=True)
class MtebReport(Report):
    """Of an mteb run, whose rows are tasks, each once for each contestant that can do it.

    ``results`` are those of the published files, earlier runs' included. ``left_out`` counts by task the
    passages that have no vector and the queries that have no result.
    """

    output: str
    rules: str
    mteb_version: str
    contestants: tuple[Contestant, ...]
    results: tuple[TaskScore, ...]
    means: tuple[Mean, ...]
    left_out: dict[str, int]


def read_report(kind: type[R], data: bytes | None) -> R | None:
    """Return a report of this version; None if there is none, or it is of another job or version."""
    try:
        report = from_json(kind, data or b"{}")
    except ValueError:
        return None
    return report if report.format_version == REPORT_FORMAT_VERSION else None
