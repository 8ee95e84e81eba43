"""What the name of an object says: its format, its compression, and what separates its fields.

The one table of endings. Whoever reads a corpus, queries, qrels or candidates asks here.
"""

import re
from dataclasses import dataclass

_FORMATS = {
    "parquet": "parquet",
    "pq": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "csv": "csv",
    "tsv": "csv",
}
_DELIMITERS = {"tsv": "\t"}
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "zstd": "zstd"}
_PACKED = rf"(?:\.(?P<packed>{'|'.join(_COMPRESSIONS)}))?\Z"
_ENDING = re.compile(rf"(?:\.(?P<kind>{'|'.join(_FORMATS)}))?{_PACKED}", re.IGNORECASE)
_BEIR_FILE = re.compile(rf"(?P<folder>.*/)(?P<name>corpus|queries)\.jsonl{_PACKED}")


@dataclass(frozen=True)
class Ending:
    """Of one name: ``format`` is parquet, jsonl, csv, or "" where the name tells none.

    ``compression`` is "", "gzip" or "zstd"; ``delimiter`` separates the fields of a CSV.
    """

    format: str
    compression: str
    delimiter: str


def ending_of(uri: str) -> Ending:
    """Return what the ending of a name means, in any case of letters."""
    found = _ENDING.search(uri)
    kind, packed = (found["kind"], found["packed"]) if found is not None else (None, None)
    kind = (kind or "").lower()
    compression = _COMPRESSIONS.get((packed or "").lower(), "")
    return Ending(_FORMATS.get(kind, ""), compression, _DELIMITERS.get(kind, ","))


def beir_folder(uri: str, name: str) -> str | None:
    """Return the folder, with its slash, if the object is the corpus or the queries of a BEIR data set.

    Args:
        uri: of an object.
        name: "corpus" or "queries".
    """
    found = _BEIR_FILE.fullmatch(uri)
    return found["folder"] if found is not None and found["name"] == name else None
