"""What a process must not pay for: torch takes seconds and hundreds of megabytes."""

import subprocess
import sys

DRIVERS = ("embed", "index", "search", "rerank", "evaluate")
TASKS = ("read", "write", "search_stages", "search_parts", "rerank_stages", "rerank_texts", "index_tasks")


def test_only_processes_that_hold_a_model_load_torch() -> None:
    modules = [f"bge_ray.pipeline.{name}" for name in (*TASKS, *DRIVERS)]
    script = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
