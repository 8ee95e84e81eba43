"""The card of a data set: README.md, for a person, and for `datasets.load_dataset(<output>)`."""

from collections.abc import Mapping, Sequence

import yaml

from bge_ray.records.dataset import DatasetSpec, Manifest
from bge_ray.records.model import BM25, ModelSpec
from bge_ray.records.outputs import VALUE_BYTES, Output

_HOLDS = {
    "dense": "one vector of {dim} numbers, {dtype}",
    BM25: "how often each token is there: `indices`, ascending token ids, and `values`, {dtype}",
    "sparse": "token weights: `indices`, ascending token ids, and `values`, {dtype}",
    "multi": "one vector a token: the {bytes} bytes of {dim} numbers each, {dtype}, lowest byte first",
    "scalar": "one number, {dtype}",
}
# How an output that needs a word is read; ``column`` is one of pyarrow, as one array.
_READING = {
    "sparse": """
```python
# {name}: a matrix of compressed rows. column = table["{name}"].combine_chunks()
import scipy.sparse

indices, values = column.field("indices"), column.field("values")
parts = (values.values.to_numpy().astype("float32"), indices.values.to_numpy(), indices.offsets.to_numpy())
matrix = scipy.sparse.csr_matrix(parts, shape=(len(column), {dim}))
```
""",
    "multi": """
```python
# {name}: all vectors, and where each row's begin. column = table["{name}"].combine_chunks()
import numpy

vectors = numpy.frombuffer(column.values.buffers()[1], "{dtype}").reshape(-1, {dim})
starts = column.offsets.to_numpy()  # row i: vectors[starts[i]:starts[i + 1]]
```
""",
}
_TEXT = """
# Embeddings by {model}

{rows_out:,} of {rows_in:,} passages, in {vectors:,} rows; {rejected:,} were rejected, each with its reason
in `rejected/`. Written by bge-ray.

| column | holds |
|---|---|
{outputs}

| | |
|---|---|
| model | {model}{revision} |
| pooling, longest text | {pooling}, {max_length} tokens |
| unit norm | {normalize} |
| put before a passage | {passage_instruction} |
| put before a query | {query_instruction} |

`manifest.json` names the files that belong together, with their sha256; `dataset.json` says how they were
made.

```python
import datasets

rows = datasets.load_dataset({root!r}, split="train")
```
{reading}

`vector_id` leads back to a row of the corpus: `object_no << 41 | row_no << 13 | chunk_no`, with the objects
in the newest file of `plan/`. `text_hash` is the 16-byte blake2b of what the model read.
"""


def make_card(root: str, spec: DatasetSpec, manifest: Manifest, *, only_live: Sequence[str] = ()) -> bytes:
    """Return the card.

    Args:
        root: URI of the data set, for the example.
        spec: what it is.
        manifest: what is in it.
        only_live: paths of the live shards, while others lie beside them; none if there are no others.
    """
    model = spec.model
    files = {"split": "train", "path": list(only_live) or "embeddings/*.parquet"}
    configs = [{"config_name": "default", "data_files": [files]}]
    front = {"configs": configs, "tags": ["embeddings", "bge-ray"]}
    text = _TEXT.format(
        root=root,
        model=model.name,
        revision=f" at {model.revision}" if model.revision else "",
        vectors=manifest.vectors,
        outputs="\n".join(f"| `{o.name}` | {_told(_HOLDS, o)} |" for o in model.outputs),
        reading="".join(_told(_READING, o) for o in model.outputs if o.kind in _READING),
        rows_out=manifest.rows_out,
        rows_in=manifest.rows_in,
        rejected=manifest.rows_rejected,
        pooling="none" if model.counts_only else model.pooling,
        max_length=model.max_length,
        normalize="yes" if model.normalize else "no",
        passage_instruction=repr(model.passage_instruction) if model.passage_instruction else "nothing",
        query_instruction=_around_query(model),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{text}".encode()


def _told(texts: Mapping[str, str], output: Output) -> str:
    size = VALUE_BYTES[output.dtype] * output.dim
    return texts.get(output.name, texts[output.kind]).format(
        name=output.name, dim=output.dim, dtype=output.dtype, bytes=size
    )


def _around_query(model: ModelSpec) -> str:
    before, behind = model.around_query()
    parts = [f"{len(model.examples)} examples (dataset.json)"] if model.examples else []
    parts += [repr(before)] if before else []
    parts += [f"and behind it {behind!r}"] if behind else []
    return ", ".join(parts) or "nothing"
