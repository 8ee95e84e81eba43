"""Retrieval sets in the BEIR layout out of what every Debian and every Python has, for `bge-ray mteb`.

    apt-get update -o Dir::State::lists=$PWD/lists -o Acquire::Languages=en,zh_CN
    /usr/lib/apt/apt-helper cat-file lists/*main_i18n_Translation-en*.lz4 > Translation-en
    python -m tools.beir_sets debian --descriptions Translation-en --out debian-en --queries 300
    python -m tools.beir_sets docstrings --out docstrings-en --queries 300

A passage is the long description of a package, its query the short one; or a docstring of the standard
library without its first sentence, its query that sentence. Texts that stand twice count once, and every
passage that a query stands over is what it asks for. What is drawn goes by a seed.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np

from bge_ray.formats.docstrings import find_docstrings

MIN_CHARS = 60
SEED = 17


def descriptions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (short, long) descriptions of a Translation file of apt."""
    for entry in path.read_text(encoding="utf-8").split("\n\n"):
        found = re.search(r"^Description-\w+: (.*)\n((?: .*\n?)+)", entry, re.MULTILINE)
        if found is not None:
            lines = (line.strip() for line in found[2].splitlines())
            yield found[1].strip(), " ".join(line for line in lines if line != ".")


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield (first sentence, rest) of the docstrings of the standard library."""
    # The standard library comes first, and this is the first of what is installed beside it.
    for _, _, text in takewhile(lambda found: not found[0].startswith("_distutils_hack"), find_docstrings()):
        first, _, rest = " ".join(text.split()).partition(". ")
        yield first, rest


def known_items(
    pairs: Iterator[tuple[str, str]], passages: int, queries: int
) -> tuple[dict[str, str], dict[str, str], list[tuple[str, str]]]:
    """Return passages and queries by id, and which belong together.

    Args:
        pairs: (query, passage), in any number.
        passages: how many are drawn at most.
        queries: of those that ask for these passages, how many at most.
    """
    asked: dict[str, str] = {}
    for query, passage in pairs:
        if query and len(passage) >= MIN_CHARS:
            asked.setdefault(passage, query)
    order = np.random.default_rng(SEED).permutation(len(asked))[:passages]
    every = list(asked)
    drawn = {f"p{number}": every[number] for number in sorted(order.tolist())}
    wanted: dict[str, list[str]] = {}
    for passage_id, passage in drawn.items():
        wanted.setdefault(asked[passage], []).append(passage_id)
    kept = list(wanted)[:queries]
    named = {f"q{number}": query for number, query in enumerate(kept)}
    judged = [(query_id, passage_id) for query_id, query in named.items() for passage_id in wanted[query]]
    return drawn, named, judged


def write_beir(
    folder: Path, passages: dict[str, str], queries: dict[str, str], judged: list[tuple[str, str]]
) -> None:
    """Write a folder in the BEIR layout."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, texts in (("corpus", passages), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}, ensure_ascii=False) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [f"{query_id}\t{passage_id}\t1" for query_id, passage_id in judged]
    head = "query-id\tcorpus-id\tscore"
    (folder / "qrels" / "test.tsv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")


def main() -> int:
    """Write one set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("debian", "docstrings"))
    parser.add_argument("--descriptions", type=Path, help="a Translation file, unpacked; for debian")
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--passages", type=int, default=2000, help="most of them")
    parser.add_argument("--queries", type=int, default=300, help="most of them")
    arguments = parser.parse_args()
    if arguments.kind == "debian" and arguments.descriptions is None:
        parser.error("debian needs --descriptions")
    pairs = docstrings() if arguments.kind == "docstrings" else descriptions(arguments.descriptions)
    passages, queries, judged = known_items(pairs, arguments.passages, arguments.queries)
    write_beir(arguments.out, passages, queries, judged)
    print(
        f"{arguments.out}: {len(passages):,} passages, {len(queries):,} queries, {len(judged):,} judgements"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
