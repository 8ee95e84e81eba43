"""What a process must not pay for: torch takes seconds and hundreds of megabytes, Ray Data a second.

DuckDB, once imported by a module of ours, tells of leaks when a process ends that was in a Ray.
"""

import subprocess
import sys

DRIVERS = (
    "pipeline.embed.job",
    "pipeline.index.job",
    "pipeline.search.job",
    "pipeline.rerank.job",
    "evaluate",
    "notebook",
    "retrieval",
    "jobs",
    "demo.job",
)
TASKS = (
    "embed.read",
    "embed.write",
    "search.stages",
    "runs.parts",
    "rerank.score",
    "engine.model_stage",
    "rerank.texts",
    "index.tasks",
)


def test_a_process_loads_torch_or_ray_data_only_once_it_has_work_for_it() -> None:
    modules = [*(f"bge_ray.pipeline.{name}" for name in TASKS), *(f"bge_ray.{name}" for name in DRIVERS)]
    script = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'ray.data', 'duckdb'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
