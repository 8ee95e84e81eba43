"""An LLM embedder through the whole job: half precision that does not hold it ends the run by name."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bge_ray.model.spec import text_feeder
from bge_ray.pipeline.embed.job import embed
from bge_ray.settings.sections import parse_settings
from tests.model.conftest import cosines, encode, resolve, vectors
from tests.support.corpora import jsonl_bytes
from tests.support.datasets import vectors_by_id
from tests.support.models import make_decoder
from tests.support.runs import JobProcess


def keys_for(root: Path, model: Path, dtype: str) -> dict[str, object]:
    return {
        "corpus.uri": root / "corpus.jsonl",
        "output.uri": root / dtype,
        "model.name": model,
        "model.dtype": dtype,
        "resources.num_encoders": 1,
    }


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_overflows_float16_ends_the_run_and_runs_in_bfloat16(tmp_path: Path) -> None:
    model = make_decoder(tmp_path / "model", "mistral")
    weights = load_file(model / "model.safetensors")
    common = int(text_feeder(resolve(model)).passages(["Q"]).input_ids[-2])
    weights["embed_tokens.weight"][common] *= 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    texts = [f"{'Q' if row % 2 else 'a fox'} {row}" for row in range(60)]
    rows = [{"id": f"p{row:02}", "text": text} for row, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_bytes(jsonl_bytes(rows))
    # A process of its own: pytest keeps what was raised, whose frames hold the actor that raised it.
    run = JobProcess(tmp_path / "log", keys_for(tmp_path, model, "float16"))
    assert run.wait() == 2, run.log()
    assert re.search(r"not in float16.* Compute it in bfloat16 \(model\.dtype", run.log())
    keys = keys_for(tmp_path, model, "bfloat16")
    result = embed(parse_settings(None, [f"{key}={value}" for key, value in keys.items()]))
    assert (result.manifest.rows_out, result.manifest.rows_rejected) == (60, 0)
    found = vectors_by_id(str(tmp_path / "bfloat16"))
    assert len(found) == 60
    exact = vectors(encode(model, texts))
    ours = np.stack([found[key] for key in sorted(found)]).astype(np.float32)
    assert cosines(ours, exact).min() > 0.99
