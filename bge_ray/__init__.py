"""Corpora in object storage become BGE embeddings, a FAISS index and reranked runs, as batch jobs on Ray.

`embed`, `open_dataset` and `open_index` are what other programs use; everything else is private. Importing
this package loads nothing large.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bge_ray.dataset.reader import DatasetReader
    from bge_ray.records.reports import EmbedReport
    from bge_ray.retrieval import IndexReader
    from bge_ray.settings.sections import Settings

__all__ = ["__version__", "embed", "open_dataset", "open_index"]

__version__ = "0.1.0"


def embed(settings: "Settings | Mapping[str, Any] | None" = None, /, **overrides: Any) -> "EmbedReport":
    """Embed a corpus into a data set, doing only what is not done yet; the job `bge-ray embed`.

    A Ray that is running is used and stays; otherwise this joins the cluster of ``resources.address`` or
    RAY_ADDRESS, or starts one on this machine (on the loopback interface, behind a token of its own), and
    leaves it again. Ray's data context, signal handlers, loggers' levels, warning filters and the
    environment are as they were afterwards. To be called from the main thread, if signals are to stop it.

        report = bge_ray.embed({"corpus": {"uri": "s3://bucket/corpus"}, "output": {"uri": "/data/out"}})
        report = bge_ray.embed(corpus__uri="/data/corpus", output__uri="/data/out", model__dtype="bfloat16")
        print(report.outcome, report.rows_out)

    Args:
        settings: sections with their keys, as a config file has them, or settings that were parsed.
        **overrides: single settings, ``section__key``; they win over ``settings``.

    Returns:
        The content of report.json: ``outcome``, ``rows_in``, ``rows_out``, ``rows_rejected``, ``advice``, ...

    Raises:
        BgeRayError: of `bge_ray.errors`, where each error has its ``exit_code``. SettingsError, CorpusError,
            ModelError, DatasetMismatchError, OutputCollisionError, OutputBusyError: nothing was written.
            IncompleteRunError, TakenOverError, StorageError: call again to continue. RejectedRowsError: too
            many rows were rejected.
    """
    from bge_ray.notebook import embed as embedded

    return embedded(settings, overrides)


def open_dataset(uri: str) -> "DatasetReader":
    """Open a data set that the embed job completed, for reading; needs no Ray and no model.

        dataset = bge_ray.open_dataset("s3://bucket/embeddings")
        for batch in dataset.batches(columns=["title"]):
            batch.vectors  # (n, dim) float16 or float32
            batch.passage_ids, batch.metadata
        dataset.get(["doc-1", "doc-7"])  # rows by passage id

    What is read is the state of the manifest at this moment; a later run of the job leaves its files in
    place for ``output.grace_s`` seconds.

    Args:
        uri: folder of the data set (``output.uri``) on any fsspec URI; credentials come from the environment.

    Raises:
        SettingsError: there is no complete data set.
        DatasetMismatchError: its files do not belong together, or are of another version.
        StorageError: it cannot be read.
    """
    from bge_ray.dataset.reader import open_reader

    return open_reader(uri)


def open_index(
    uri: str, *, model: str | None = None, device: str = "cpu", stale_index: bool = False
) -> "IndexReader":
    """Open a data set for questions, in this process and without Ray; it stays open.

        index = bge_ray.open_index("s3://bucket/embeddings")
        for hit in index.search("how do I read a file?", k=5)[0]:
            print(hit.score, hit.passage_id)

    Its index is searched, or where it has none its vectors, exactly. Files of the index are fetched to this
    machine's disk at the first search, checked against their sha256 and mapped into memory.

    Args:
        uri: folder of the data set (``output.uri``) on any fsspec URI.
        model: where the model of the data set lies, if not where it lay for the embed job.
        device: torch device on which questions are encoded, such as "cuda".
        stale_index: search an index that lacks passages of the data set, which it then does not find.

    Raises:
        SettingsError: there is no complete data set, or its vectors are not normalised.
        DatasetMismatchError: its files do not belong together, or the index is of other vectors, or of fewer.
        InstallationError: FAISS is not installed.
        StorageError: it cannot be read.
    """
    from bge_ray.retrieval import open_index_reader

    return open_index_reader(uri, model=model, device=device, stale_index=stale_index)
