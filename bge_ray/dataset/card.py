"""The card of a data set: README.md, for a person, and for `datasets.load_dataset(<output>)`."""

from collections.abc import Sequence

import yaml

from bge_ray.records.dataset import DatasetSpec, Manifest
from bge_ray.records.model import ModelSpec

_TEXT = """
# Embeddings by {model}

{vectors:,} vectors of {dim} dimensions ({dtype}) for {rows_out:,} of {rows_in:,} passages; {rejected:,} rows
were rejected, each with its reason in `rejected/`. Written by bge-ray.

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
        dim=model.dim,
        dtype=model.output("embedding").dtype,
        rows_out=manifest.rows_out,
        rows_in=manifest.rows_in,
        rejected=manifest.rows_rejected,
        pooling=model.pooling,
        max_length=model.max_length,
        normalize="yes" if model.normalize else "no",
        passage_instruction=repr(model.passage_instruction) if model.passage_instruction else "nothing",
        query_instruction=_around_query(model),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{text}".encode()


def _around_query(model: ModelSpec) -> str:
    before, behind = model.around_query()
    parts = [f"{len(model.examples)} examples (dataset.json)"] if model.examples else []
    parts += [repr(before)] if before else []
    parts += [f"and behind it {behind!r}"] if behind else []
    return ", ".join(parts) or "nothing"
