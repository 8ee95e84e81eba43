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
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from bge_ray.demo.known import draw, write_beir
from bge_ray.formats.docstrings import STANDARD_LIBRARY, known_items


def descriptions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (short, long) descriptions of a Translation file of apt."""
    for entry in path.read_text(encoding="utf-8").split("\n\n"):
        found = re.search(r"^Description-\w+: (.*)\n((?: .*\n?)+)", entry, re.MULTILINE)
        if found is not None:
            lines = (line.strip() for line in found[2].splitlines())
            yield found[1].strip(), " ".join(line for line in lines if line != ".")


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
    docstrings = arguments.kind == "docstrings"
    pairs = known_items(STANDARD_LIBRARY) if docstrings else descriptions(arguments.descriptions)
    passages, queries, judged = draw(pairs, arguments.passages, arguments.queries)
    write_beir(arguments.out, passages, queries, judged)
    print(
        f"{arguments.out}: {len(passages):,} passages, {len(queries):,} queries, {len(judged):,} judgements"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
