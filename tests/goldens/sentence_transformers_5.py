"""Makes `sentence_transformers_5/`: folders as version 5 lays them out, and the vectors it makes of them.

Run from the repository with that version, which cannot be installed beside version 6:
``pip install "sentence-transformers>=5,<5.3"`` in an environment of its own, then
``PYTHONPATH=. python tests/goldens/sentence_transformers_5.py``.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer, __version__, models

from tests.support.models import make_encoder

TARGET = Path(__file__).with_suffix("")
TEXTS = [
    "the quick brown fox",
    "a corpus in object storage becomes embeddings and an index " * 4,
    "Faiss searches VECTORS",
    "为这个句子生成表示",
]


def save(name: str, kind: str, limit: int | None, pooling: dict[str, object], after: list, **options: object):
    base = make_encoder(TARGET / "base", kind=kind, dim=8, layers=1, positions=48)
    transformer = models.Transformer(str(base), max_seq_length=limit)
    torch.manual_seed(3)
    modules = [transformer, models.Pooling(8, **pooling), *(make() for make in after)]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(TARGET / name))
    shutil.rmtree(base)
    (TARGET / name / "README.md").unlink()
    model = SentenceTransformer(str(TARGET / name), device="cpu")
    made = {"query": model.encode_query(TEXTS), "document": model.encode_document(TEXTS)}
    return {side: [[round(float(x), 8) for x in row] for row in rows] for side, rows in made.items()}


def main() -> None:
    if not __version__.startswith("5."):
        sys.exit(f"sentence-transformers is {__version__}, and not of version 5")
    shutil.rmtree(TARGET, ignore_errors=True)
    prompts = {"query": "how do i ", "document": "a corpus "}
    identity = torch.nn.Identity()
    vectors = {
        "layers": save(
            "layers",
            "bert",
            None,
            {"pooling_mode": "mean"},
            [
                lambda: models.Dense(8, 12, bias=False, activation_function=identity),
                lambda: models.Dense(12, 6),
                models.Normalize,
            ],
            prompts=prompts,
        ),
        "side-by-side": save(
            "side-by-side",
            "xlm-roberta",
            20,
            {"pooling_mode": None, "pooling_mode_cls_token": True, "pooling_mode_weightedmean_tokens": True,
             "pooling_mode_mean_tokens": False},
            [],
        ),
        "without-prompt": save(
            "without-prompt",
            "bert",
            32,
            {"pooling_mode": "mean", "include_prompt": False},
            [models.Normalize],
            prompts=prompts,
            default_prompt_name="query",
        ),
    }  # fmt: skip
    made_by = {"sentence-transformers": __version__, "torch": torch.__version__}
    content = {"made_by": made_by, "texts": TEXTS, "vectors": vectors}
    (TARGET / "vectors.json").write_text(json.dumps(content, ensure_ascii=False))


if __name__ == "__main__":
    main()
