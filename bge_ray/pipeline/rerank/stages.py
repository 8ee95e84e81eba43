"""The stages of reranking: texts of a group, the tokens of a unit's pairs, and their logits."""

import functools
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.errors import BgeRayError
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.spec import model_folder, pair_feeder
from bge_ray.pipeline.engine.device import device_or_exit
from bge_ray.pipeline.engine.isolation import Attempt, run_isolated
from bge_ray.pipeline.rerank.texts import TextSource, add_texts
from bge_ray.pipeline.runs.parcels import Parcel, ScoreJob, whole
from bge_ray.records.ids import IdArray
from bge_ray.records.model import SCORE, ModelSpec
from bge_ray.records.tokens import PackedTokens

TOKENISE_PAIRS = 1024


def texts_stage(batch: pa.Table, source: TextSource | None, depth: int) -> Iterator[pa.Table]:
    """Add the texts to a group's candidates, and yield its units one by one."""
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        yield batch
        return
    started = time.time()
    table = parcel.table
    try:
        if source is not None:
            table = add_texts(table, source, depth)
    except BgeRayError as error:
        yield parcel.failed(str(error)).to_batch()
        return
    facts = parcel.facts | {"texts_s": time.time() - started}
    rows = table["row_no"].to_numpy()
    for unit in parcel.task.todo:
        mine = (rows >= unit.first_row) & (rows < unit.first_row + unit.n_rows)
        yield Parcel(parcel.task.of_unit(unit), table.filter(pa.array(mine)), facts).to_batch()
        facts = {}  # what the group cost is counted once, with its first unit


def pair_stage(batch: pa.Table, job: ScoreJob) -> pa.Table:
    """Tokenise the pairs of a unit; their texts stay behind."""
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        return batch
    with Attempt(job.place.ledger, f"pair {parcel.task.name}") as attempt:
        if attempt.total_deaths >= job.place.max_attempts:
            return parcel.failed(f"its process died {attempt.total_deaths} times").to_batch()
        return _pair(parcel, parcel.table, job, attempt).to_batch()


def _pair(parcel: Parcel, table: pa.Table, job: ScoreJob, attempt: Attempt) -> Parcel:
    started = time.time()
    feeder = _load_feeder(job.spec, trust_remote_code=job.device.trust_remote_code)
    able = pc.and_(pc.is_valid(table["text"]), pc.is_null(table["reason"]))
    scored = np.flatnonzero(able.to_numpy())
    pairs = table.select(["query", "text"]).take(pa.array(scored))
    queries, texts = pairs["query"].to_pylist(), pairs["text"].to_pylist()
    done: list[tuple[IdArray, PackedTokens]] = []
    faults: dict[int, tuple[str, str]] = {}

    def run(pieces: Sequence[IdArray]) -> None:
        for piece in pieces:
            rows = feeder.pairs([queries[i] for i in piece], [texts[i] for i in piece])
            done.append((scored[piece], rows))

    def reject(i: int, detail: str) -> None:
        faults[int(scored[i])] = ("killed_worker", detail)

    everything = np.arange(len(scored), dtype=np.int64)
    pieces = [everything[i : i + TOKENISE_PAIRS] for i in range(0, len(scored), TOKENISE_PAIRS)]
    run_isolated(attempt, "tokenising", pieces, run, reject)
    facts = {
        "pair_s": time.time() - started,
        "pair_tokens": sum(int(rows.offsets[-1]) for _, rows in done),
        "truncated_pairs": sum(int(rows.truncated.sum()) for _, rows in done),
    }
    return parcel.filled(_with_tokens(_with_faults(table, faults), done), **facts)


def _with_tokens(table: pa.Table, done: list[tuple[IdArray, PackedTokens]]) -> pa.Table:
    """Put token ids, and where the passage begins in them, in the place of the texts; null where none."""
    tokens: list[np.ndarray | None] = [None] * len(table)
    types: list[int | None] = [None] * len(table)
    for numbers, rows in done:
        offsets = rows.offsets
        for place, number in enumerate(numbers.tolist()):
            tokens[number] = rows.input_ids[offsets[place] : offsets[place + 1]]
            types[number] = None if rows.type_starts is None else int(rows.type_starts[place])
    return (
        table.drop_columns(["text", "query"])
        .append_column("input_ids", pa.array(tokens, pa.list_(pa.int32())))
        .append_column("type_start", pa.array(types, pa.int32()))
    )


class ScoreStage:
    """An actor that holds one reranker; tokenised pairs in, their logits out."""

    def __init__(self, job: ScoreJob) -> None:
        """Load the model."""
        from bge_ray.model.run.model import Model, Place  # torch, only where there is a model

        self._job = job
        device = job.device
        place = Place(device.name, device.threads, device.trust_remote_code)
        self._model = Model(job.spec, model_folder(job.spec), place)
        if device.name != "cpu":
            self._model.warm_up(device.token_budget)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score the pairs of one unit."""
        parcel = Parcel.from_batch(batch)
        if parcel.table is None:
            return batch
        with Attempt(self._job.place.ledger, f"score {parcel.task.name}") as attempt:
            if attempt.total_deaths >= self._job.place.max_attempts:
                return parcel.failed(f"its reranker died {attempt.total_deaths} times").to_batch()
            return self._score(parcel, parcel.table, attempt).to_batch()

    def _score(self, parcel: Parcel, table: pa.Table, attempt: Attempt) -> Parcel:
        started = time.time()
        scored = np.flatnonzero(pc.is_valid(table["input_ids"]).to_numpy())
        pairs = _packed(table.select(["input_ids", "type_start"]).take(pa.array(scored)))
        result = self._model.empty_result(len(scored))

        def run(batches: Sequence[IdArray]) -> None:
            with device_or_exit(f"pairs {parcel.task.name}"):
                self._model.run(pairs, batches, result)

        def reject(i: int, detail: str) -> None:
            result.faults[i] = ("killed_worker", detail)

        batches = self._model.cut(pairs.lengths, self._job.device.token_budget)
        run_isolated(attempt, "scoring", batches, run, reject)
        good = np.array([i not in result.faults for i in range(len(scored))], dtype=np.bool_)
        logits = np.full(len(table), np.nan, dtype=np.float32)
        logits[scored[good]] = result.array(SCORE)[good]
        table = table.drop_columns(["input_ids", "type_start"])
        place = table.schema.get_field_index("logit")
        table = table.set_column(place, table.schema.field("logit"), pa.array(logits, from_pandas=True))
        table = _with_faults(table, {int(scored[i]): fault for i, fault in result.faults.items()})
        facts = {
            "score_started": started,
            "score_ended": time.time(),
            "device_s": result.busy_s,
            "padded_tokens": result.padded_tokens,
        }
        return parcel.filled(table, **facts)


def _packed(table: pa.Table) -> PackedTokens:
    """Return the pairs of a table with ``input_ids`` and ``type_start`` as the reranker takes them."""
    ids = whole(table["input_ids"])
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(pc.list_value_length(ids).to_numpy())])
    types = table["type_start"]
    has_types = len(table) and types.null_count == 0
    return PackedTokens(
        ids.flatten().to_numpy(),
        offsets.astype(np.int32),
        np.zeros(len(table), dtype=np.bool_),
        types.to_numpy().astype(np.int32) if has_types else None,
    )


def _with_faults(table: pa.Table, faults: dict[int, tuple[str, str]]) -> pa.Table:
    """Write reason and detail into the rows of the given numbers."""
    if not faults:
        return table
    for column, part in (("reason", 0), ("detail", 1)):
        values = table[column].to_pylist()
        for number, fault in faults.items():
            values[number] = fault[part]
        place = table.schema.get_field_index(column)
        table = table.set_column(place, table.schema.field(column), pa.array(values, pa.string()))
    return table


@functools.lru_cache(maxsize=2)
def _load_feeder(spec: ModelSpec, *, trust_remote_code: bool) -> PairFeeder:
    # Ray counts one CPU for this task; the tokenizer's own threads would take the others, too.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return pair_feeder(spec, trust_remote_code=trust_remote_code)
