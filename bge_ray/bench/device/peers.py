"""What a user would pick instead, on the same device, texts and weights: sentence-transformers."""

import time
from typing import Any

from bge_ray.bench.device.job import make_corpus, make_job_model, texts_of
from bge_ray.bench.device.plan import Note, Plan
from bge_ray.model.feed.texts import TextFeeder


def run(plan: Plan, note: Note) -> None:
    """Note its tokens/s by batch size and attention; tokenising is a part of it."""
    from sentence_transformers import SentenceTransformer

    model_path = make_job_model(plan)
    corpus, _, _ = make_corpus(plan)
    texts = texts_of(corpus, 40_000 if plan.on_gpu else 300)
    tokens = int(TextFeeder(model_path, 512).passages(texts).lengths.sum())
    found: dict[str, Any] = {}
    for name, batch, options in _ways(plan):
        if plan.left < 5:
            found[name] = {"left_out": "no time was left"}
            continue
        try:
            model = SentenceTransformer(
                str(model_path), device=plan.device, model_kwargs={"dtype": plan.half, **options}
            )
        except (ImportError, ValueError) as error:
            found[name] = {"left_out": f"{error}"[:300]}
            continue
        model.max_seq_length = 512
        model.encode(texts[: 4 * batch], batch_size=batch, normalize_embeddings=True)
        started = time.perf_counter()
        model.encode(texts, batch_size=batch, normalize_embeddings=True)
        seconds = time.perf_counter() - started
        found[name] = {
            "tokens_per_s": tokens / seconds,
            "rows_per_s": len(texts) / seconds,
            "seconds": seconds,
        }
        note("ways", found)
    note("ways", found)


def _ways(plan: Plan) -> list[tuple[str, int, dict[str, str]]]:
    ways: list[tuple[str, int, dict[str, str]]] = [("defaults (batches of 32)", 32, {})]
    if plan.on_gpu:
        flash = {"attn_implementation": "flash_attention_2"}
        ways += [("batches of 256", 256, {}), ("flash attention, batches of 256", 256, flash)]
    return ways
