"""What a user would pick instead, on the same device, texts and weights: sentence-transformers.

Its flash attention wants a package that has to be built. Where that is not, torch's own kernel, which is the
same, takes its place under the package's names.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from bge_ray.bench.device.job import make_corpus, make_job_model, texts_of
from bge_ray.bench.device.plan import Note, Plan
from bge_ray.model.feed.texts import TextFeeder


def run(plan: Plan, note: Note) -> None:
    """Note its tokens/s by batch size and attention; tokenising is a part of it."""
    from sentence_transformers import SentenceTransformer

    model_path = make_job_model(plan)
    corpus, _, _ = make_corpus(plan)
    texts = texts_of(corpus, 40_000 if plan.on_gpu else 300)
    lengths = TextFeeder(model_path, 512).passages(texts).lengths
    found: dict[str, Any] = {}
    for name, batch, share, options in _ways(plan):
        if plan.left < 5:
            found[name] = {"left_out": "no time was left"}
            continue
        try:
            model = SentenceTransformer(str(model_path), device=plan.device, model_kwargs=options)
        except (ImportError, ValueError) as error:
            found[name] = {"left_out": f"{error}"[:300]}
            continue
        model.max_seq_length = 512
        part = texts[: int(share * len(texts))]
        model.encode(part[: 4 * batch], batch_size=batch, normalize_embeddings=True)
        started = time.perf_counter()
        model.encode(part, batch_size=batch, normalize_embeddings=True)
        seconds = time.perf_counter() - started
        found[name] = {
            "tokens_per_s": int(lengths[: len(part)].sum()) / seconds,
            "rows_per_s": len(part) / seconds,
            "seconds": seconds,
        }
        note("ways", found)
    note("ways", found)


def _ways(plan: Plan) -> list[tuple[str, int, float, dict[str, str]]]:
    """Name, rows of a batch, share of the texts, and how the model is loaded; the most telling first."""
    if not plan.on_gpu:
        return [("defaults (batches of 32)", 32, 1.0, {"dtype": plan.half})]
    flash = {"dtype": plan.half, "attn_implementation": "flash_attention_2"}
    kernel = "the package's kernel" if _lend_torch_kernel() is None else "torch's kernel"
    return [
        (f"float16, flash attention ({kernel}), batches of 256", 256, 1.0, flash),
        (f"float16, flash attention ({kernel}), batches of 32", 32, 1.0, flash),
        ("float16, batches of 32", 32, 0.5, {"dtype": plan.half}),
        ("float16, batches of 256", 256, 0.5, {"dtype": plan.half}),
        ("defaults (float32, batches of 32)", 32, 0.2, {}),
    ]


def _lend_torch_kernel() -> Callable[..., torch.Tensor] | None:
    """Let transformers take torch's kernel for that of the package flash-attn; None where there is one."""
    import transformers.modeling_flash_attention_utils as flash
    from transformers import PreTrainedModel
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return None

    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        borders = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
        found: torch.Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, *borders, dropout_p, causal, False, scale=softmax_scale
        )[0]
        return found

    def rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        raise NotImplementedError("rows of one width go through the packed kernel, too")

    lent = (rows, varlen, None, flash._pad_input, flash._unpad_input)
    flash._lazy_imports = lambda *_, **__: lent
    PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True
    return varlen
