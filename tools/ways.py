"""Count the ways through the code: which functions one reads to follow a row, a vector, a query, a pair.

`python tools/ways.py` prints them with their lines, `--markdown` writes them into the decision record.

A way names the functions of this package that its subject passes through in the ordinary case, in the order
in which they are first entered; each is counted once, its whole body with docstring and comments. Left out is
what happens once a run or once a process (planning, sizing, loading a tokenizer or a model, leases), what
only a failure enters, and helpers of a few lines that only answer a question.
"""

import argparse
import ast
import functools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "bge_ray"
RECORD = ROOT / "docs" / "decisions" / "0015-four-ways.md"
BEGIN, END = "<!-- ways: begin -->", "<!-- ways: end -->"

# How a parcel is sent to a stage, and how its stage takes it.
PARCEL = (
    "pipeline.engine.parcel:Parcel.to_batch Parcel.from_batch Parcel.task_as Parcel.filled _cell ipc_buffer",
    "records.canonical:to_json from_json",
)
ATTEMPT = ("pipeline.engine.isolation:Attempt.__enter__ Attempt.__exit__ run_isolated",)
READ_PARQUET = (
    "formats.corpus:read_units",
    "records.plan:span_units",
    "formats.corpus:_check_unchanged",
    "storage.objects:Storage.info Storage.attempt",
    "formats.corpus:_read",
    "formats.parquet:read_parquet open_parquet _to_rows _ids _texts",
    "storage.objects:Storage.open RangeFile.read Storage.read_range",
    "formats.corpus:_check_count",
    "formats.rows:check_rows _passage_id _passage_text unicode_fault",
)
TEXT_TOKENS = (
    "pipeline.engine.tokenise:tokenise",
    "model.feed.texts:TextFeeder._cut Cutter.cut",
    "records.tokens:PackedTokens.concatenate",
    "pipeline.engine.rows:with_tokens with_faults",
)
# From vector ids to what is stored of them, through the actors that hold it.
HELD = (
    "pipeline.runs.holders:Holders.places Holders._dealt Holders._ask RowHolder.places",
    "dataset.held:HeldShards.places HeldShards.rows HeldShards._group MappedTables.get MappedTables.put",
    "dataset.lookup:ShardMap.split take_rows _positions",
)
# A packed batch on a CPU.
MODEL = (
    "pipeline.engine.model_stage:ModelStage.__call__",
    "pipeline.engine.room:Presence.unit",
    "pipeline.engine.model_stage:ModelStage._run ModelStage._at_device _placed",
    "pipeline.engine.rows:packed_tokens without_tokens",
    "records.arrays:whole",
    "model.run.model:Model.empty_result Model.cut",
    "model.run.result:Result.__init__",
    "model.run.batching:token_budget_batches",
    "pipeline.engine.device:device_or_exit",
    "model.run.model:Model.run",
    "model.run.executor:Executor.run Executor._try_launch _none_if_out_of_memory Executor._launch",
    "model.run.inputs:packed_inputs _gather to_device",
    "model.run.packed:positions equal_runs",
    "model.run.prepack:PrepackedLinear.forward",
    "model.run.packed:packed_attention attend _heads_first",
    "model.run.last_layer:OneTokenLayer.forward",
)
RESULT = (
    "model.run.inputs:pool",
    "model.run.executor:_checked _send _copied Executor._collect Executor._put _Launched.blocks _Sent.block",
    "model.run.result:Result.put Block.beyond Result.columns Result._column",
)
RECEIPT = (
    "pipeline.engine.flow:receipts follow",
    "pipeline.engine.receipts:draw_receipts",
    "report.facts:read_receipt RunFacts.book",
)
INTAKE = (
    "pipeline.runs.intake:take_in _cut _content _pieces",
    "pipeline.runs.groups:GroupTask.parcel",
    "pipeline.engine.flow:parcels by_tasks by_actors",
    "pipeline.runs.intake:read_group",
)
PUBLISH_RUN = (
    "pipeline.runs.parts:part_stage write_part",
    *RECEIPT,
    "pipeline.runs.work:_book RunWork.publish",
    "pipeline.runs.parts:publish RunOutput.open _RunWriter.__init__ _read_parts _count",
    "pipeline.runs.parts:_RunWriter.write _run_rows rank_rows _passages",
    "formats.runs:encode_trec",
    "pipeline.runs.parts:ParquetFile.write ParquetFile._flush PieceFile.write PieceFile._flush_piece",
    "pipeline.runs.parts:_RunWriter.publish ParquetFile.publish PieceFile.publish",
    "storage.ownership:OwnedFolder.put",
)

# Each entry is a module below the package, and functions or methods of it.
WAYS: Mapping[str, Sequence[str]] = {
    "a row of a Parquet corpus to its shard": (
        "pipeline.embed.job:EmbedWork._run embedding_receipts",
        "pipeline.embed.tasks:ReadTask.parcel",
        "pipeline.engine.flow:parcels by_tasks by_actors",
        *PARCEL,
        "pipeline.embed.read:read_stage read_parcels _read_span",
        *ATTEMPT,
        *READ_PARQUET,
        "formats.parquet:_keep",
        "pipeline.embed.read:_filled _make cut_parcel",
        "pipeline.embed.cut:Texts.of cut_passages",
        "records.schemas:hash_texts",
        "pipeline.embed.reuse:Earlier.near find_reused",
        "dataset.reuse:hash_array",
        "pipeline.embed.read:tokenise_pieces",
        "pipeline.embed.cut:tokens_of",
        "pipeline.engine.tokenise:tokenise in_pieces",
        "model.feed.texts:TextFeeder.passages TextFeeder._cut Cutter.cut",
        "records.tokens:PackedTokens.of PackedTokens.concatenate",
        "pipeline.embed.read:unit_table",
        "records.ids:vector_ids",
        "pipeline.embed.cut:with_pieces with_columns",
        "pipeline.embed.reuse:Reused.to_encode Reused.settled with_reused",
        "pipeline.engine.rows:spread with_tokens with_faults",
        "pipeline.embed.read:count_lengths",
        *MODEL,
        "model.heads:Pooled.forward",
        *RESULT,
        "pipeline.embed.write:commit_stage",
        "pipeline.embed.reuse:settle_reused",
        "pipeline.embed.write:split_rows _of_unit",
        "records.schemas:embedding_schema",
        "records.outputs:Output.field Output.type",
        "dataset.commit:ShardWriter.commit ShardWriter._create ShardWriter._encode marker_path",
        "storage.objects:Storage.create Storage.write",
        *RECEIPT,
        "pipeline.embed.job:EmbedWork._book",
    ),
    "a vector of a shard to an IVF index": (
        "pipeline.index.build:carry_build _merge",
        "pipeline.index.steps:Build.run get_trained _draw_sample",
        "pipeline.engine.tasks:run_tasks",
        "pipeline.index.tasks:sample_task",
        "dataset.read:sample_vectors arrays_of",
        "index.vectors:check_rows",
        "pipeline.index.tasks:train_task",
        "index.train:train _train_lists",
        "pipeline.index.steps:add_parts group_shards",
        "pipeline.index.tasks:add_task TrainedFile.load",
        "index.train:load_trained",
        "pipeline.index.tasks:ShardReader.__iter__",
        "dataset.read:read_vectors",
        "storage.objects:Storage.read Storage.attempt",
        "index.add:add_part _batches",
        "index.vectors:check_vectors check_unique normalise",
        "index.train:rotate",
        "index.add:_assign _encode",
        "index.part:write_part",
        "storage.concatenate:write_large",
        "pipeline.index.tasks:open_stored",
        "index.part:open_part",
        "pipeline.index.steps:list_sizes",
        "index.merge:total_sizes check_parts",
        "index.part:part_sizes",
        "pipeline.index.steps:merge_parts",
        "index.merge:plan_ranges",
        "pipeline.index.tasks:piece_task",
        "index.merge:merged_range",
        "index.part:read_table read_blocks Part.read_exactly",
        "pipeline.index.steps:finish_ivf",
        "pipeline.index.tasks:finish_task",
        "index.header:ivf_header _list_sizes",
        "storage.concatenate:concatenate plan_parts _concatenate_s3 _put_part",
        "pipeline.index.tasks:file_facts",
        "pipeline.index.steps:check_count",
        "pipeline.index.build:_describe",
    ),
    "a query to its run, over an index": (
        "pipeline.search.job:SearchJob.blocks",
        "formats.queries:read_queries _read_query_object _without_seen",
        "formats.corpus:scan_sought",
        "formats.jsonl:scan_jsonl read_jsonl parse_line",
        "formats.lines:open_lines iter_lines read_units_of to_rows",
        "formats.corpus:read_units _read _check_count _check_unchanged",
        "formats.rows:check_rows _passage_id _passage_text unicode_fault take_passages",
        "pipeline.search.filtering:Filtering.read",
        *INTAKE,
        *PARCEL,
        "pipeline.search.job:SearchJob._flow SearchJob.encoded",
        "pipeline.search.stages:read_queries_stage _tokenised",
        *ATTEMPT,
        "model.feed.texts:TextFeeder.queries",
        *TEXT_TOKENS,
        *MODEL,
        "model.heads:Pooled.forward",
        *RESULT,
        "pipeline.search.stages:retrieve_stage _retrieve",
        "pipeline.search.stages:_filter_faults",
        "pipeline.search.filtering:by_filter",
        "pipeline.search.finders:Finder.find Finder._queries Finder.among",
        "pipeline.search.retrieve:retrieve",
        "index.refill:refill",
        "pipeline.search.retrieve:_ask",
        "pipeline.index.searchers:search_all Searcher.search",
        "pipeline.engine.tasks:wait_for fetched",
        "index.search:search _search _parameters _unclear",
        "index.vectors:check_rows normalise",
        "index.topk:best merge_topk",
        *HELD,
        "pipeline.search.retrieve:_choose",
        "pipeline.search.finders:_side_by_side",
        "pipeline.search.stages:_filter_facts RetrieveJob.k _as_candidates",
        *PUBLISH_RUN,
    ),
    "a pair of a run to its score": (
        "pipeline.rerank.job:RerankJob.blocks",
        "formats.candidates:read_candidate_lists _read_parts _parquet_parts",
        "formats.candidate_table:split",
        "formats.candidates:_plain",
        "formats.runs:sort_candidates",
        "pipeline.rerank.job:_block",
        *INTAKE,
        *PARCEL,
        "pipeline.rerank.job:RerankJob._flow",
        "pipeline.rerank.score:by_reranker",
        "pipeline.runs.intake:read_group_stage",
        "pipeline.rerank.score:texts_stage",
        "pipeline.rerank.texts:add_texts _to_score _choose_texts TextSource.places_of TextSource._places",
        "pipeline.engine.tasks:run_tasks fetched",
        "pipeline.runs.holders:Holders.find RowHolder.find",
        "dataset.held:HeldShards.find",
        "dataset.lookup:find_in",
        "pipeline.rerank.texts:TextSource.texts_of TextSource._passages",
        "pipeline.runs.passages:spans_of _span_map span_texts _body_starts",
        "pipeline.runs.holders:Holders.texts RowHolder.texts RowHolder._span_texts",
        *READ_PARQUET,
        "records.ids:vector_ids id_range",
        "pipeline.rerank.score:pair_stage _pair",
        *ATTEMPT,
        "pipeline.engine.tokenise:tokenise",
        "model.feed.pairs:PairFeeder.pairs PairFeeder._cut_once",
        "model.feed.texts:Cutter.cut",
        "records.tokens:PackedTokens.concatenate",
        "pipeline.engine.rows:with_tokens with_faults",
        *MODEL,
        "model.heads:Logit.forward",
        *RESULT,
        *PUBLISH_RUN,
    ),
}


@dataclass(frozen=True)
class Step:
    """One function of a way; ``file`` is its path below the repository, ``lines`` those of its body."""

    file: str
    name: str
    lines: int


def follow(way: Sequence[str]) -> list[Step]:
    """Return the functions of a way in the order in which they are first entered, each once.

    Raises:
        LookupError: a module, or a function of it, is not there.
    """
    steps: dict[Step, None] = {}
    for entry in way:
        module, _, names = entry.partition(":")
        file = f"{PACKAGE}/{module.replace('.', '/')}.py"
        for name in names.split():
            if name not in _functions(file):
                raise LookupError(f"{file}: has no function {name}; tools/ways.py names it")
            steps[Step(file, name, _functions(file)[name])] = None
    return list(steps)


@functools.cache
def _functions(file: str) -> dict[str, int]:
    """Return the lines of each function and method of a file, from its first decorator on."""
    if not (ROOT / file).is_file():
        raise LookupError(f"{file}: is not there; tools/ways.py names it")
    found: dict[str, int] = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _lines(node)
        elif isinstance(node, ast.ClassDef):
            methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            found |= {f"{node.name}.{method.name}": _lines(method) for method in methods}
    return found


def _lines(node: ast.FunctionDef) -> int:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return (node.end_lineno or node.lineno) - first + 1


def total(steps: Sequence[Step]) -> str:
    """Return lines, functions and files of a way, for a reader."""
    files = {step.file for step in steps}
    return f"{sum(s.lines for s in steps):,} lines in {len(steps)} functions of {len(files)} files"


def to_text() -> str:
    """Return all ways, one function a line."""
    blocks = []
    for name, way in WAYS.items():
        steps = follow(way)
        lines = [f"  {step.lines:4} {step.file}:{step.name}" for step in steps]
        blocks.append("\n".join([f"{name}: {total(steps)}", *lines]))
    return "\n\n".join(blocks)


def to_markdown() -> str:
    """Return a table of the ways, what they share, and the functions of each by file, with their lines."""
    counted = {name: follow(way) for name, way in WAYS.items()}
    lines = ["| way | lines | functions | files | most of them in |", "|---|---|---|---|---|"]
    for name, steps in counted.items():
        files = {step.file for step in steps}
        lines.append(f"| {name} | {_lines_of(steps)} | {len(steps)} | {len(files)} | {_homes(steps)} |")
    row, _, query, pair = (set(steps) for steps in counted.values())
    common = row & query & pair
    lines += [
        "",
        f"A row, a query and a pair have {_lines_of(common)} lines in {len({s.file for s in common})} files "
        f"in common. Who has followed a row reads {_lines_of(query - row)} more for a query, and then "
        f"{_lines_of(pair - query - row)} more for a pair.",
    ]
    for name, steps in counted.items():
        lines += ["", f"**{name[0].upper()}{name[1:]}**", ""]
        lines += [f"{number}. `{file}`: {names}" for number, (file, names) in enumerate(_visits(steps), 1)]
    return "\n".join(lines)


def _lines_of(steps: Iterable[Step]) -> str:
    return f"{sum(step.lines for step in steps):,}"


def _homes(steps: Sequence[Step]) -> str:
    """Return the four folders that have most of the lines, with those."""
    homes: Counter[str] = Counter()
    for step in steps:
        homes["/".join(step.file.split("/")[1:-1])] += step.lines
    return ", ".join(f"`{home}` {lines}" for home, lines in homes.most_common(4))


def _visits(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """Return (file, its functions with their lines) for each stay in a file."""
    visits: list[tuple[str, str]] = []
    for step in steps:
        text = f"{step.name} {step.lines}"
        if visits and visits[-1][0] == step.file:
            visits[-1] = (step.file, f"{visits[-1][1]}, {text}")
        else:
            visits.append((step.file, text))
    return visits


def with_ways(record: str) -> str:
    """Return the text of the record with the ways as they are now between its two markers.

    Raises:
        LookupError: a marker is missing.
    """
    before, begin, rest = record.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise LookupError(f"{RECORD}: the markers {BEGIN} and {END} are not there")
    return f"{before}{BEGIN}\n\n{to_markdown()}\n\n{END}{after}"


def main() -> int:
    """Print the ways, or write them into the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help=f"write them into {RECORD.relative_to(ROOT)}")
    try:
        if parser.parse_args().markdown:
            RECORD.write_text(with_ways(RECORD.read_text()))
        else:
            sys.stdout.write(f"{to_text()}\n")
    except LookupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
