"""A model that no encoder could load is found before anything is written, so that, mended, it is this one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bge_ray.errors import ModelError
from bge_ray.pipeline.embed.job import embed, plan_only
from bge_ray.settings.sections import parse_settings
from tests.support.reading import jsonl_bytes

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def without_a_weight(path: Path) -> None:
    weights = load_file(path)
    del weights["encoder.layer.0.attention.self.key.weight"]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("tokenizer.json", lambda path: path.write_text("{")),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("model.safetensors", without_a_weight),
    ],
    ids=["tokenizer", "cut off", "a weight less"],
)
def test_it_is_refused_in_a_line_and_mended_it_runs(
    tmp_path: Path, tiny_model: Path, name: str, spoil: Callable[[Path], object]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (tmp_path / "corpus.jsonl").write_bytes(jsonl_bytes([{"id": "1", "text": "one"}]))
    keys = {"corpus.uri": tmp_path / "corpus.jsonl", "output.uri": tmp_path / "out", "model.name": model}
    settings = parse_settings(None, [f"{key}={value}" for key, value in keys.items()])
    spoil(model / name)
    for job in (plan_only, embed):
        with pytest.raises(ModelError) as caught:
            job(settings)
        assert str(model) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.exit_code == 2
        assert not (tmp_path / "out").exists()
    shutil.copy(tiny_model / name, model / name)
    assert embed(settings).report.rows_out == 1
