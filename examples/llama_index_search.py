"""Ask a finished data set through LlamaIndex: `python examples/llama_index_search.py OUT "a question"`.

OUT is a local `output.uri` that was embedded with `corpus.keep_columns: [text]` and indexed into one file.
Needs `pip install llama-index-vector-stores-faiss sentence-transformers`.
"""

import json
import sys
from pathlib import Path

import faiss
import pyarrow.dataset as ds
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.vector_stores import VectorStoreQuery
from llama_index.vector_stores.faiss import FaissVectorStore
from sentence_transformers import SentenceTransformer


def retrieve(root: Path, question: str, k: int = 5) -> list[NodeWithScore]:
    """Return the k passages nearest to a question, best first; a node's id is the passage id.

    Args:
        root: the data set.
        question: in words; the model's instruction for queries is put in front of it.
        k: how many.
    """
    # The file answers with vector ids and holds its tuned nprobe; mapped, only the lists probed are read.
    description = json.loads((root / "index/index.json").read_text())
    (file,) = description["files"]
    index = faiss.read_index(str(root / "index" / file["path"]), faiss.IO_FLAG_MMAP)
    store = FaissVectorStore(faiss_index=index)

    spec = json.loads((root / "dataset.json").read_text())["model"]
    model = SentenceTransformer(spec["name"], revision=spec["revision"], device="cpu")
    asked = model.encode(spec["query_instruction"] + question, normalize_embeddings=True)
    found = store.query(VectorStoreQuery(query_embedding=asked.tolist(), similarity_top_k=k))

    ids = [int(vector_id) for vector_id in found.ids]
    shards = ds.dataset(root / "embeddings", format="parquet")
    rows = shards.to_table(
        columns=["vector_id", "passage_id", "text"], filter=ds.field("vector_id").isin(ids)
    )
    by_id = {row["vector_id"]: row for row in rows.to_pylist()}
    # index.metric l2: FAISS answers with squared distances d; of unit vectors, 1 - d / 2 is the cosine, which
    # is what it answers with where the metric is ip.
    cosines = [float(1 - v / 2 if description["metric"] == "l2" else v) for v in found.similarities]
    return [
        NodeWithScore(node=TextNode(id_=by_id[i]["passage_id"], text=by_id[i]["text"]), score=cosine)
        for i, cosine in zip(ids, cosines, strict=True)
    ]


if __name__ == "__main__":
    for hit in retrieve(Path(sys.argv[1]), sys.argv[2]):
        print(f"{hit.score:.3f}  {hit.node.node_id}: {hit.node.text[:80]!r}")
