"""The commands of the README, as they stand there: one after the other they lead from a corpus to figures."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bge_ray.storage.objects import Storage
from tests.support.corpora import docstrings, jsonl_bytes
from tests.support.models import make_cross_encoder
from tests.support.runs import REPOSITORY
from tests.support.warm import warm_environment

# A stranger takes the models of the defaults, from a hub.
MODELS = {"embed": "model.name", "rerank": "rerank.model"}


def commands() -> list[list[str]]:
    """Return the words of each command that is about a bucket, in their order."""
    blocks = re.findall(r"^```\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match("bge-ray .*s3://bucket", line)]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("s3_server")
def test_the_commands_as_they_stand_lead_from_a_corpus_to_figures(
    bucket: str, tmp_path: Path, tiny_model: Path
) -> None:
    records = docstrings(60)
    Storage(30).write(f"{bucket}/corpus/a.jsonl", jsonl_bytes(records))
    queries = [{"_id": f"q{i}", "text": record["title"]} for i, record in enumerate(records[:9])]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    judged = [f"q{i}\t{record['id']}\t1" for i, record in enumerate(records[:9])]
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    models = {"embed": tiny_model, "rerank": make_cross_encoder(tmp_path / "reranker")}
    ran = []
    for _, job, *words in commands():
        words = [word.replace("s3://bucket", bucket) for word in words]
        if job in MODELS:
            words += ["--set", f"{MODELS[job]}={models[job]}"]
        run = subprocess.run(
            [sys.executable, "-m", "bge_ray", job, *words],
            cwd=tmp_path,
            env={**os.environ, **warm_environment()},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, (job, run.stderr)
        ran.append(job)
    assert ran == ["embed", "embed", "index", "search", "rerank", "evaluate"]
    assert "nDCG@10" in run.stdout + run.stderr
