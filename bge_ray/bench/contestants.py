"""Who is measured: our job, our bare loops, and what a user would pick instead, each in a process of its own.

Run as `python -m bge_ray.bench.contestants NAME TASK.json`; the last line printed is the result as JSON. A
fresh process a run keeps thread pools, caches and CUDA contexts of one from helping or hurting another.
Times leave start-up apart: the model is loaded and has run once before the clock starts.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.bench.task import NotHereError, Result, Task, side_by_side, texts_of, timed

# Exit code of a contestant that this machine cannot run.
NOT_HERE = 69
# So much that rows alone cut the units: 50,000 with vectors of 1,024 dimensions are beyond the default.
UNIT_BYTES = 250_000_000


def bare_loop(task: Task) -> Result:
    """Our encoder without Ray, storage or tokenising: as many processes as the job has encoders."""
    texts = texts_of(task)
    return Result(side_by_side(_encode_units, task, texts), len(texts))


def _encode_units(task: Task, texts: list[str]) -> Callable[[], None]:
    from bge_ray.model.run.model import Model, Place
    from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
    from bge_ray.settings.sections import ModelSettings

    settings = ModelSettings(name=task.model, dtype=task.dtype, max_length=task.max_length)
    spec = resolve_encoder(settings, on_gpu=task.device == "cuda")
    feeder = text_feeder(spec)
    model = Model(spec, model_folder(spec), Place(task.device))
    units = [feeder.passages(texts[i : i + task.unit_rows]) for i in range(0, len(texts), task.unit_rows)]

    budget = model.settle_budget(task.token_budget)

    def work(limit: int | None = None) -> None:
        for tokens in units:
            batches = model.cut(tokens, budget)[:limit]
            model.run(tokens, batches, model.empty_result(len(tokens)))

    model.warm_up(budget)
    work(limit=1)
    return work


def embed_job(task: Task) -> Result:
    """The whole job: reading, tokenising, encoding, committing; from the first unit encoded to the last."""
    from bge_ray.pipeline.engine.cluster import disconnect, prepare_environment, quiet_ray
    from bge_ray.settings.sections import ResourcesSettings, parse_settings

    prepare_environment(ResourcesSettings())
    from bge_ray.pipeline.embed.job import embed

    with tempfile.TemporaryDirectory(prefix="bge-ray-bench-") as folder:
        keys = {
            "corpus.uri": task.corpus,
            "corpus.title_column": "null",
            "output.uri": folder,
            "output.reuse": "off",  # texts repeat, and all are to be encoded
            "model.name": task.model,
            "model.max_length": task.max_length,
            "model.dtype": task.dtype,
            "batching.unit_rows": task.unit_rows,
            "batching.unit_bytes": UNIT_BYTES,
            "batching.token_budget": task.token_budget,
            "resources.num_encoders": task.num_encoders,
        }
        with quiet_ray():
            report = embed(parse_settings(None, [f"{k}={v}" for k, v in keys.items()])).report
        disconnect(keep_logs=False)
    return Result(report.steady_s, report.rows_out, report.padding_waste, 1 - report.utilisation)


def sentence_transformers(task: Task) -> Result:
    """`SentenceTransformer.encode` as its documentation shows it, on all cores or the device."""
    return _sentence_transformer(task)


def sentence_transformers_unpadded(task: Task) -> Result:
    """The same in half precision with flash attention, which lets it leave padding out.

    Raises:
        NotHereError: not on a CUDA device, or without the package flash-attn.
    """
    from transformers.utils import is_flash_attn_2_available

    if task.device != "cuda" or not is_flash_attn_2_available():
        raise NotHereError("needs a CUDA device and the package flash-attn")
    return _sentence_transformer(task, attn_implementation="flash_attention_2")


def _sentence_transformer(task: Task, **options: str) -> Result:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(task.model, device=task.device, model_kwargs={"dtype": task.dtype, **options})
    model.max_seq_length = task.max_length
    return timed(texts_of(task), lambda texts: model.encode(texts, normalize_embeddings=True))


def onnx_runtime(task: Task) -> Result:
    """See `runtimes.onnx_runtime`."""
    from bge_ray.bench import runtimes  # torch and transformers, which other contestants need later or not

    return runtimes.onnx_runtime(task)


def openvino(task: Task) -> Result:
    """See `runtimes.openvino`."""
    from bge_ray.bench import runtimes  # as above

    return runtimes.openvino(task)


def flag_embedding(task: Task) -> Result:
    """`FlagModel.encode` with its defaults; pooling as the model's own files say."""
    from FlagEmbedding import FlagModel

    from bge_ray.model.spec import resolve_encoder
    from bge_ray.settings.sections import ModelSettings

    spec = resolve_encoder(ModelSettings(name=task.model), on_gpu=False)
    half = task.dtype == "float16"
    model = FlagModel(task.model, use_fp16=half, devices=task.device, pooling_method=spec.pooling)
    return timed(texts_of(task), lambda texts: model.encode(texts, max_length=task.max_length))


def ray_map_batches(task: Task) -> Result:
    """What the Ray Data documentation shows: `map_batches` with a class that holds a SentenceTransformer."""
    from bge_ray.pipeline.engine.cluster import connect, disconnect, prepare_environment
    from bge_ray.settings.sections import ResourcesSettings

    prepare_environment(ResourcesSettings())
    import ray.data

    connect(ResourcesSettings())
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = 1 if task.device == "cuda" else 0
    seen = (
        ray.data.read_parquet(task.corpus)
        .select_columns(["text"])
        .repartition(16)
        .map_batches(
            MapBatchesEncoder,
            fn_constructor_args=(asdict(task),),
            batch_size=64,
            num_gpus=gpus,
            num_cpus=1 if gpus else 0.5,
            compute=ray.data.ActorPoolStrategy(size=task.num_encoders),
        )
        .to_pandas()
    )
    disconnect()
    return Result(float(seen["ended"].max() - seen["started"].min()), len(seen))


class MapBatchesEncoder:
    """The class of the documentation's example."""

    def __init__(self, task: dict[str, Any]) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(
            task["model"], device=task["device"], model_kwargs={"dtype": task["dtype"]}
        )
        self._model.max_seq_length = task["max_length"]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode one batch; times stand in for the vectors, which nobody reads here."""
        started = time.time()
        self._model.encode(list(batch["text"]), normalize_embeddings=True)
        n_rows = len(batch["text"])
        return {"started": np.full(n_rows, started), "ended": np.full(n_rows, time.time())}


def reranker(task: Task) -> Result:
    """Our reranker, tokenising included: one process an encoder of the job."""
    pairs = pairs_of(task)
    return Result(side_by_side(_score_pairs, task, pairs), len(pairs))


def _score_pairs(task: Task, pairs: list[tuple[str, str]]) -> Callable[[], None]:
    from bge_ray.model.run.model import Model, Place
    from bge_ray.model.spec import model_folder, pair_feeder, resolve_reranker
    from bge_ray.settings.sections import RerankSettings

    settings = RerankSettings(model=task.reranker, dtype=task.dtype, max_length=task.max_length)
    spec = resolve_reranker(settings, on_gpu=task.device == "cuda")
    feeder = pair_feeder(spec)
    model = Model(spec, model_folder(spec), Place(task.device))
    budget = model.settle_budget(task.token_budget)

    def work(some: list[tuple[str, str]] = pairs) -> None:
        rows = feeder.pairs([q for q, _ in some], [p for _, p in some])
        model.run(rows, model.cut(rows, budget), model.empty_result(len(some)))

    model.warm_up(budget)
    work(pairs[:16])
    return work


def flag_reranker(task: Task) -> Result:
    """`FlagReranker.compute_score` with its defaults."""
    from FlagEmbedding import FlagReranker

    model = FlagReranker(task.reranker, use_fp16=task.dtype == "float16", devices=task.device)
    return timed(
        pairs_of(task),
        lambda pairs: model.compute_score([list(p) for p in pairs], max_length=task.max_length),
    )


def cross_encoder(task: Task) -> Result:
    """`CrossEncoder.predict` of sentence-transformers with its defaults."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        task.reranker, device=task.device, max_length=task.max_length, model_kwargs={"dtype": task.dtype}
    )
    return timed(pairs_of(task), lambda pairs: model.predict(pairs))


def pairs_of(task: Task) -> list[tuple[str, str]]:
    """Return (title, text) pairs of the corpus as queries and passages."""
    table = pq.read_table(task.corpus, columns=["title", "text"])
    return list(zip(table["title"].to_pylist(), table["text"].to_pylist(), strict=True))


ENCODERS: dict[str, Callable[[Task], Result]] = {
    "bge-ray job": embed_job,
    "bge-ray bare loop": bare_loop,
    "sentence-transformers": sentence_transformers,
    "sentence-transformers, flash attention": sentence_transformers_unpadded,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "FlagEmbedding": flag_embedding,
    "Ray Data map_batches + sentence-transformers": ray_map_batches,
}
RERANKERS: dict[str, Callable[[Task], Result]] = {
    "bge-ray reranker": reranker,
    "FlagReranker": flag_reranker,
    "CrossEncoder": cross_encoder,
}


def write_corpus(folder: Path, texts: list[str], titles: list[str], files: int) -> None:
    """Write texts as Parquet files that every contestant reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        rows = range(number, len(texts), files)
        columns = {
            "id": [str(i) for i in rows],
            "title": [titles[i] for i in rows],
            "text": [texts[i] for i in rows],
        }
        pq.write_table(pa.table(columns), folder / f"part-{number:03d}.parquet")


if __name__ == "__main__":
    try:
        result = (ENCODERS | RERANKERS)[sys.argv[1]](Task(**json.loads(Path(sys.argv[2]).read_text())))
    except NotHereError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(NOT_HERE)
    print("\n" + json.dumps(asdict(result)))  # noqa: T201 - the answer of this process
