"""What the figures of a run suggest to change, and from which value on; each line names the setting."""

from bge_ray.records.index import Shortfall
from bge_ray.records.model import EMBEDDING
from bge_ray.records.reports import (
    EmbedReport,
    IndexReport,
    MineReport,
    Report,
    RerankReport,
    Scoring,
    SearchReport,
    TrainReport,
)
from bge_ray.records.sparse import SparseChoice
from bge_ray.report.words import count

# Shorter runs are mostly start-up and say little about settings.
MIN_STEADY_S = 60.0
LOW_UTILISATION = 0.8
# Of the encoders' time; below this, readers keep up.
HIGH_WAITING = 0.1
# Of the readers' time; below this, more of them would wait, too.
BUSY_READERS = 0.5
HIGH_PADDING = 0.1
HIGH_TRUNCATED = 0.2
# Of what may be rejected before a run is called bad.
HIGH_REJECTED = 0.5
# Handing a unit on costs about 45 ms, so that a unit which computes for less than this wastes a tenth.
UNIT_S, SMALL_UNIT_S = 0.05, 0.45
MIN_UNITS = 20
LONG_STARTUP_S = 120.0
HIGH_STARTUP = 0.5
# A search scans this many times what it would over equal lists; k-means on embeddings gives 1.1 to 2.
HIGH_IMBALANCE = 2.5
# Of the lists, probed to reach the target: more is little better than reading everything.
HIGH_PROBED = 0.25
MIN_LISTS = 64
# Of the vectors, out of place since the training; index.max_drift trains anew from some point on.
HIGH_DRIFT = 0.15
# Of the results of a mining run, copies of positives; and of its queries, short of negatives.
HIGH_COPIES = 0.05
HIGH_SHORT = 0.2
# Of the positives, not among the results: the list is too short, or the model does not know the matter.
HIGH_BEYOND = 0.3


def advise_embed(report: EmbedReport) -> list[str]:
    """Return what to change after an embed run, most valuable first."""
    lines = [*_on_batches(report), *_on_rows(report)]
    # Where most texts have vectors, encoders wait for readers whatever the settings are.
    if report.tokens_reused <= report.tokens_encoded:
        lines = [*_on_waiting(report), *_on_units(report), *lines]
    return lines + _on_startup(report)


def advise_index(report: IndexReport) -> list[str]:
    """Return what to change after an index build, most valuable first."""
    index, lines = report.index, []
    if index is None:
        return []
    if not index.reached:
        ceiling = (index.ceiling or {}).get(f"@{index.k}")
        bound = f" (at most {ceiling.value:.4f} with all of it probed)" if ceiling else ""
        lines.append(
            f"Recall@{index.k} misses index.recall_target {index.recall_target:g}{bound}: set index.rescore "
            f"to {index.reranked_candidates:,}, which gives {index.recall_after_exact_reranking.value:.4f} "
            f"at this {index.parameter or 'effort'}, or choose an index.factory with a larger code."
        )
    if index.imbalance > HIGH_IMBALANCE:
        lines.append(
            f"The lists are uneven: a search scans {index.imbalance:.1f} times what it would over equal "
            "ones. Look for many equal texts in the corpus, or take more lists in index.factory."
        )
    probed = index.effort / index.nlist if index.parameter == "nprobe" else 0.0
    if probed > HIGH_PROBED and index.nlist >= MIN_LISTS:
        lines.append(
            f"{probed:.0%} of the lists are probed: a lower index.recall_target, or an index.factory with a "
            "larger code, makes searches faster."
        )
    if index.drift > HIGH_DRIFT:
        lines.append(
            f"{index.drift:.0%} of the vectors are out of place since the training: lower index.max_drift to "
            "train anew."
        )
    return lines + _on_startup(report)


def advise_search(report: SearchReport) -> list[str]:
    """Return what to change after a search, most valuable first."""
    lines = []
    index = report.index
    if index is not None and index.lacking_shards:
        lines.append(
            f"The index is older than the data set: {index.lacking_shards:,} shards are not in it, and none "
            "of their passages was found. Run index.py, then search again."
        )
    if index is not None and index.shortfall is not None:
        lines.append(advise_shortfall(index.shortfall))
    if index is not None and (report.k > index.tuned_k or index.rescore < index.tuned_rescore):
        lines.append(
            f"The recall of the index was measured for {index.tuned_k:,} results a query, "
            f"{index.tuned_rescore:,} candidates rescored for {report.k:,}; this search asked for "
            f"{report.k:,}, {index.rescore:,} rescored, and may find less. Run index.py with the search.k "
            "and search.rescore that searches use."
        )
    if index is not None and report.filtered_queries > report.compared_all:
        lines.append(
            f"For {report.filtered_queries - report.compared_all:,} queries with a filter the index was "
            "searched, and its recall was measured without filters: what it is among what passes is not "
            "known. A sample of the queries with search.exact tells."
        )
    lines += _on_sparse(report.sparse)
    if report.few_passing:
        lines.append(
            f"{report.few_passing:,} queries have filters that fewer passages pass than search.k "
            f"({report.k:,}): they have all that pass, and no more."
        )
    if report.unknown_ids:
        lines.append(
            f"{report.unknown_ids:,} results were vectors that the data set no longer has, and others took "
            "their places: the index is older than the data set. Run index.py."
        )
    if report.missing_results and EMBEDDING in report.found_by:
        lines.append(
            f"{report.missing_results:,} results are missing, though all of the index was looked through, or "
            "2,000,000 vectors for a query: it holds fewer passages with different ids than search.k."
        )
    if report.doubled_passages:
        lines.append(
            f"{report.doubled_passages:,} results were passages whose id stands more than once, and were "
            "dropped for others: give each passage of the corpus an id of its own."
        )
    lines += _on_trec(report)
    if report.truncated_queries > HIGH_TRUNCATED * max(1, report.queries_in):
        lines.append(
            f"{report.truncated_queries:,} queries were cut at model.max_length: shorten them, or search "
            "with parts of them."
        )
    if report.scoring is not None:
        lines += _on_scoring(report, report.scoring)
    return lines + _on_startup(report)


def advise_shortfall(shortfall: Shortfall) -> str:
    """Say that an index misses its target, and what finds more; a search says so when it begins, too."""
    rescored = (
        f"set search.rescore to {shortfall.rescore:,}, which gives {shortfall.rescored:.4f}"
        if shortfall.rescore is not None
        else "build one with index.rescore, or with a larger code (index.factory)"
    )
    return f"Passages are missed: {shortfall}: {rescored}, or set search.exact, which finds all."


def advise_sparse(choice: SparseChoice) -> str:
    """Say that an approximate search of weights misses its target; a search says so when it begins, too."""
    return (
        f"Weights are searched exactly: no approximation reached search.sparse_recall {choice.target:g}. "
        f"The dearest that was tried has {choice}. Lower search.sparse_recall, or set search.sparse to "
        "exact, which saves the trial."
    )


def _on_sparse(choice: SparseChoice | None) -> list[str]:
    if choice is None:
        return []
    if not choice.taken:
        return [advise_sparse(choice)]
    if choice.approximate_ms < choice.exact_ms:
        return []
    return [f"Searching weights approximately saved nothing: {choice}. Set search.sparse to exact."]


def advise_rerank(report: RerankReport) -> list[str]:
    """Return what to change after a rerank run, most valuable first."""
    return _on_scoring(report, report.scoring) + _on_trec(report) + _on_startup(report)


def advise_mine(report: MineReport) -> list[str]:
    """Return what to change after a mining run, most valuable first."""
    verdicts, lines = report.verdicts, []
    results = sum(verdicts.values()) - verdicts["positive"]
    copies = verdicts["same_text"] + verdicts["copy_by_vector"] + verdicts["copy_by_words"]
    if report.queries_out and report.queries_short > HIGH_SHORT * report.queries_out:
        lines.append(
            f"{report.queries_short:,} queries have fewer negatives than mine.negatives and are not in "
            "tuples.parquet: raise mine.depth, or lower mine.negatives."
        )
    if results and copies > HIGH_COPIES * results:
        lines.append(
            f"{copies:,} of {results:,} results are copies of positives: drop doubled passages from the "
            "corpus, or judge them as the positives that they are."
        )
    if verdicts["positive"] and report.positives_beyond > HIGH_BEYOND * verdicts["positive"]:
        lines.append(
            f"{report.positives_beyond:,} of {verdicts['positive']:,} positives are not among the results: "
            "raise mine.depth, or check that model, queries and corpus are of one matter."
        )
    return lines + _on_startup(report)


def advise_train(report: TrainReport) -> list[str]:
    """Return what to make of a training, and what to change in the next."""
    found = report.figures
    if found is None:
        return ["Nothing says whether the model is better: name queries in train.held_out."]
    gain = found.difference
    if gain is None or gain.low > 0:
        return []
    queries = count(found.queries, "held-out query", "held-out queries")
    if gain.high < 0:
        return [
            f"The model answers {queries} worse than before, by {-gain.mean:.3f} of MRR@10: keep the old "
            "one. Lower train.learning_rate or train.steps, and look whether negatives are answers (bge-ray "
            "mine, with a reranker as teacher)."
        ]
    return [
        f"On {queries} no difference to the model before can be told ({gain.mean:+.3f} of MRR@10, "
        f"{gain.low:+.3f} to {gain.high:+.3f}): hold out more queries, or train on more."
    ]


def _on_trec(report: SearchReport | RerankReport) -> list[str]:
    return [
        f"There is no run.trec: {why}. evaluate.py reads run.parquet; other programs need ids without blanks."
        for why in report.without_trec[:1]
    ]


def _on_scoring(report: Report, scoring: Scoring) -> list[str]:
    lines = []
    if report.steady_s > MIN_STEADY_S and scoring.utilisation < LOW_UTILISATION:
        lines.append(
            f"The rerankers computed {scoring.utilisation:.0%} of the time: add CPUs for the stages before "
            "them, or lower rerank.num_rerankers."
        )
    if scoring.padding_waste > HIGH_PADDING:
        lines.append(
            f"{scoring.padding_waste:.0%} of the computed tokens were padding: raise rerank.unit_pairs, so "
            "that more pairs are sorted by length together, or lower rerank.token_budget."
        )
    if scoring.truncated_pairs > HIGH_TRUNCATED * max(1, scoring.pairs_out):
        lines.append(
            f"{scoring.truncated_pairs:,} pairs were cut: raise rerank.max_length if the model has "
            "positions for more."
        )
    return lines


def _on_startup(report: Report) -> list[str]:
    if report.wall_s <= LONG_STARTUP_S or report.startup_s <= HIGH_STARTUP * report.wall_s:
        return []
    return [
        f"{report.startup_s / report.wall_s:.0%} of the time was start-up: keep the cluster warm, "
        "or run less often over more at once."
    ]


def _on_waiting(report: EmbedReport) -> list[str]:
    if report.steady_s < MIN_STEADY_S or report.utilisation >= LOW_UTILISATION:
        return []
    busy = f"The encoders computed {report.utilisation:.0%} of the time"
    if report.waiting >= HIGH_WAITING and report.readers_busy < BUSY_READERS:
        return [
            f"{busy} and waited for input {report.waiting:.0%}, though the "
            f"{report.workers.get('readers', 0)} readers were busy {report.readers_busy:.0%} only: units are "
            "handed on too slowly, and more readers would not help. Larger units (batching.unit_rows, larger "
            "corpus objects) cost less to hand on; so do fewer resources.num_encoders."
        ]
    if report.waiting >= HIGH_WAITING:
        return [
            f"{busy} and waited for input {report.waiting:.0%}: raise resources.num_readers above "
            f"{report.workers.get('readers', 0)} (each takes a CPU core; they were busy "
            f"{report.readers_busy:.0%}), or add CPUs."
        ]
    return [
        f"{busy}, though input was there: too few units to keep {report.workers.get('encoders', 0)} encoders "
        f"busy to the end. Lower batching.unit_rows (it was {report.settings['batching']['unit_rows']}), or "
        "resources.num_encoders."
    ]


def _on_units(report: EmbedReport) -> list[str]:
    units = report.units_done
    if units < MIN_UNITS or report.stage_s.get("encode", 0.0) / units >= SMALL_UNIT_S:
        return []
    unit_s = report.stage_s.get("encode", 0.0) / units
    rows, limit = report.rows_in / units, report.settings["batching"]["unit_rows"]
    is_cut = limit != "auto" and rows > 0.5 * limit
    way = (
        f"raise batching.unit_rows above {limit:,}, or leave it to auto"
        if is_cut
        else "merge the corpus objects into larger ones, for each has a shard of its own"
    )
    return [
        f"The units are small, {rows:,.0f} rows and {unit_s:.2f} s of encoding each, and each costs about "
        f"{UNIT_S:.2f} s to hand on and to commit: {way}."
    ]


def _on_batches(report: EmbedReport) -> list[str]:
    lines = []
    batching = report.settings["batching"]
    if report.memory_splits:
        lines.append(
            f"Batches that did not fit in memory and were halved: {report.memory_splits:,}. Lower "
            f"batching.token_budget (it was {batching['token_budget']})."
        )
    if report.padding_waste > HIGH_PADDING:
        lines.append(
            f"{report.padding_waste:.0%} of the computed tokens were padding: raise batching.unit_rows (it "
            f"was {batching['unit_rows']}), so that more texts are sorted by length together, or lower "
            "batching.token_budget."
        )
    return lines


def _on_rows(report: EmbedReport) -> list[str]:
    lines = []
    # Of chunks it is their passage's title that was cut.
    chunked = report.settings["chunking"]["max_tokens"] is not None
    if report.rows_out and not chunked and report.truncated > HIGH_TRUNCATED * report.rows_out:
        lines.append(
            f"{report.truncated / report.rows_out:.0%} of the texts were cut at "
            f"{report.model.max_length:,} tokens: cut them into chunks (chunking.max_tokens), or "
            "raise model.max_length if the model has positions for more; both need another output.uri."
        )
    allowed = report.settings["corpus"]["max_rejected_fraction"] * report.rows_in
    if report.rows_rejected and report.rows_rejected > HIGH_REJECTED * allowed:
        lines.append(
            f"{report.rows_rejected:,} rows were rejected, {allowed:,.0f} are allowed by "
            "corpus.max_rejected_fraction: mend the corpus (the folder rejected/ names each), or raise it."
        )
    return lines
