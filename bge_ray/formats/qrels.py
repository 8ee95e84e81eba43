"""Judged relevance: TREC qrels, and BEIR's tsv with its header."""

import re

from bge_ray.errors import CorpusError
from bge_ray.formats.lines import read_text_lines
from bge_ray.storage.objects import Storage


def read_qrels(storage: Storage, uri: str) -> dict[str, dict[str, int]]:
    """Return relevance by query and passage, of TREC qrels or of BEIR's tsv with its header.

    Raises:
        CorpusError: no such object, a bad line, or two judgements of one pair that disagree.
    """
    info = storage.info(uri)
    if info is None:
        raise CorpusError(f"{uri}: no such object")
    qrels: dict[str, dict[str, int]] = {}
    for line in read_text_lines(storage, info):
        if line.text is None:
            raise CorpusError(f"{uri}: {line.place}: {line.fault}")
        fields = line.text.split()
        if line.number == 1 and fields[0].lower() in ("query-id", "query_id", "qid"):
            continue
        if len(fields) == 4:
            fields = [fields[0], *fields[2:]]
        if len(fields) != 3 or not re.fullmatch(r"[-+]?\d+", fields[2]):
            raise CorpusError(
                f"{uri}: {line.place}: expected `query_id 0 passage_id relevance` or "
                f"`query-id corpus-id score` with a whole number, got {line.text[:100]!r}"
            )
        query_id, passage_id, relevance = fields[0], fields[1], int(fields[2])
        if qrels.setdefault(query_id, {}).setdefault(passage_id, relevance) != relevance:
            raise CorpusError(
                f"{uri}: {line.place}: query {query_id!r} and passage {passage_id!r} are judged "
                f"{relevance} here and {qrels[query_id][passage_id]} earlier"
            )
    if not qrels:
        raise CorpusError(f"{uri}: no judgement in it")
    return qrels
