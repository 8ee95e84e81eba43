"""Corpus and queries of a task as our jobs read them: the texts that mteb lets a model read, with their ids.

mteb joins title and text, appends a query's own instruction to it, and joins the turns of a conversation.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.storage.objects import Storage, join

ROWS_OF_A_FILE = 50_000
_TEXTS = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string())])


def document_text(row: Mapping[str, Any]) -> str:
    """Return what a model reads of a document."""
    title, text = row.get("title"), row["text"] or ""
    return str(f"{title} {text}" if title else text).strip()


def query_text(row: Mapping[str, Any]) -> str:
    """Return what a model reads of a query: its text or conversation, and an instruction of its own."""
    text, instruction = row["text"], row.get("instruction")
    if isinstance(text, str):
        return text if instruction is None else f"{text} {instruction}"
    turns = [turn if isinstance(turn, str) else f"{turn['role']}: {turn['content']}" for turn in text]
    told = "; ".join(turns)
    return told if instruction is None else f"{instruction} {told}"


def queries_of(queries: Any) -> dict[str, str]:
    """Return the text of each query of mteb's table by its id."""
    return {str(row["id"]): query_text(row) for row in queries}


def write_corpus(storage: Storage, folder: str, corpus: Any) -> None:
    """Write a corpus of mteb's as Parquet files with id and text; what is there is the same, and stays.

    Memory: the rows of a file.
    """
    for number, start in enumerate(range(0, len(corpus), ROWS_OF_A_FILE)):
        uri = join(folder, f"{number:06d}.parquet")
        if storage.info(uri) is not None:
            continue
        rows = corpus.select(range(start, min(start + ROWS_OF_A_FILE, len(corpus))))
        storage.write(uri, _parquet([str(row["id"]) for row in rows], [document_text(row) for row in rows]))


def write_queries(storage: Storage, uri: str, queries: Mapping[str, str]) -> None:
    """Write queries as a Parquet file with id and text, unless it is there."""
    if storage.info(uri) is None:
        storage.write(uri, _parquet(list(queries), list(queries.values())))


def write_candidates(
    storage: Storage, uri: str, queries: Mapping[str, str], ranked: Mapping[str, Sequence[str]], corpus: Any
) -> None:
    """Write the candidates of each query with both texts, as the rerank job reads them, unless that is there.

    Memory: the texts of the corpus that are candidates, and the file.
    """
    if storage.info(uri) is not None:
        return
    wanted = {passage_id for query_id in queries for passage_id in ranked.get(query_id, ())}
    texts = {str(row["id"]): document_text(row) for row in corpus if str(row["id"]) in wanted}
    names = ("query_id", "query", "passage_id", "text")
    sink = io.BytesIO()
    schema = pa.schema([pa.field(name, pa.string()) for name in names])
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for query_id, query in queries.items():
            rows = [(query_id, query, one, texts[one]) for one in ranked.get(query_id, ())]
            if rows:
                columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
                writer.write_table(pa.table(columns, schema=schema))
    storage.write(uri, sink.getvalue())


def read_results(storage: Storage, folder: str) -> Iterator[tuple[str, str, float]]:
    """Yield (query id, passage id, score) of a run."""
    data = storage.read(join(folder, "run.parquet"))
    file = pq.ParquetFile(pa.BufferReader(data))
    for batch in file.iter_batches(columns=["query_id", "passage_id", "score"]):
        yield from zip(*(batch.column(i).to_pylist() for i in range(3)), strict=True)


def _parquet(ids: list[str], texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table([pa.array(ids), pa.array(texts)], schema=_TEXTS), sink, compression="zstd")
    return sink.getvalue()
