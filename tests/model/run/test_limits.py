"""What a model cannot do is told: a device too small, a dtype too narrow, a row without tokens."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_ray.errors import ModelError
from bge_ray.model.run import memory
from bge_ray.model.run.load import Loading
from bge_ray.model.run.memory import check_device, check_room, memory_of
from bge_ray.model.spec import family_of, resolve_reranker, text_feeder
from bge_ray.model.weights import count_numbers, weights_bytes
from bge_ray.records.model import as_reranker
from bge_ray.settings.sections import RerankSettings
from tests.model.conftest import MakeModel, load, resolve, run, vectors
from tests.support.llm_rerankers import make_llm_reranker
from tests.support.models import make_decoder


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of which texts with the token of "lazy" are infinite in float16, and finite in float32."""
    folder = make_decoder(tmp_path_factory.mktemp("wide") / "m", "mistral")
    weights = load_file(folder / "model.safetensors")
    weights["embed_tokens.weight"][lazy(folder)] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def lazy(folder: Path) -> int:
    ids = text_feeder(resolve(folder)).passages(["Q"]).input_ids.tolist()
    return int(ids[-2])


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_need_float32_are_few_or_the_dtype_is_refused(overflowing: Path, packed: bool) -> None:
    spec = resolve(overflowing, dtype="float16").stored_as("float32")
    exact = resolve(overflowing)
    texts = ["the fox"] * 1100
    few = [*texts, *["Q"] * 11]
    result = run(load(spec, packed=packed), text_feeder(spec).passages(few), 10_000)
    assert not result.faults
    theirs = vectors(run(load(exact), text_feeder(exact).passages(["Q"])))
    np.testing.assert_allclose(vectors(result)[-1:], theirs, atol=1e-6, rtol=0)
    many = [*texts, *["Q"] * 12]
    with pytest.raises(ModelError, match=r"more than 1%, are finite in float32 and not in float16.*bfloat16"):
        run(load(spec, packed=packed), text_feeder(spec).passages(many), 10_000)


def test_the_share_is_of_all_rows_of_a_model(overflowing: Path) -> None:
    spec = resolve(overflowing, dtype="float16").stored_as("float32")
    model, feeder = load(spec), text_feeder(spec)
    run(model, feeder.passages(["Q"] * 10))  # ten are too few to tell
    run(model, feeder.passages(["the fox"] * 1190), 10_000)
    run(model, feeder.passages(["Q"] * 2))
    with pytest.raises(ModelError, match="bfloat16"):
        run(model, feeder.passages(["Q"] * 1))


def test_bfloat16_holds_them(overflowing: Path) -> None:
    spec = resolve(overflowing, dtype="bfloat16").stored_as("float32")
    assert not run(load(spec), text_feeder(spec).passages(["Q"] * 30)).faults


def test_rows_that_are_finite_in_no_dtype_are_rejected_and_refuse_none(
    overflowing: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(overflowing, folder)
    weights = load_file(folder / "model.safetensors")
    weights["embed_tokens.weight"][lazy(folder)] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spec = resolve(folder, dtype="float16")
    result = run(load(spec), text_feeder(spec).passages(["Q"] * 30))
    assert {reason for reason, _ in result.faults.values()} == {"non_finite"} and len(result.faults) == 30


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [1, 1000])
def test_a_text_without_tokens_is_rejected_by_name(tmp_path: Path, packed: bool, budget: int) -> None:
    folder = make_decoder(tmp_path / "m", "qwen2", ends=False)
    spec = resolve(folder, last_token="")
    texts = ["", "the fox", "", "a corpus in object storage", ""]
    tokens = text_feeder(spec).passages(texts)
    assert tokens.lengths.tolist()[::2] == [0, 0, 0]
    result = run(load(spec, packed=packed), tokens, budget)
    assert {row: reason for row, (reason, _) in result.faults.items()} == dict.fromkeys(
        [0, 2, 4], "no_tokens"
    )
    whole = vectors(run(load(spec), text_feeder(spec).passages([texts[1], texts[3]])))
    np.testing.assert_allclose(vectors(result)[[1, 3]], whole, atol=1e-6, rtol=0)
    nothing = run(load(spec, packed=packed), text_feeder(spec).passages(["", ""]), budget)
    assert sorted(nothing.faults) == [0, 1]


def test_numbers_are_counted_by_the_headers(encoder_folder: MakeModel) -> None:
    folder = encoder_folder("bert", "cls")
    weights = load_file(folder / "model.safetensors")
    assert count_numbers(folder) == sum(weight.numel() for weight in weights.values())
    assert (
        weights_bytes(folder, "bfloat16") * 2 == weights_bytes(folder, "float32") == 4 * count_numbers(folder)
    )


def write_nothing_but_sizes(path: Path, numbers: dict[str, int]) -> None:
    """Write the header of weights of so many thousands of numbers, and a hole in place of these."""
    header, at = {}, 0
    for name, size in numbers.items():
        header[name] = {"dtype": "F32", "shape": [size // 1000, 1000], "data_offsets": [at, at + 4 * size]}
        at += 4 * size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + at)
        except OSError:
            pytest.skip("the file system has no files of this size")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_larger_than_its_device_is_refused_with_its_size(
    encoder_folder: MakeModel, tmp_path: Path, dtype: str
) -> None:
    """By the header of a sparse file: its weights are not there, and would be too large for the machine."""
    folder = tmp_path / "m"
    shutil.copytree(encoder_folder("bert", "cls"), folder)
    write_nothing_but_sizes(folder / "model.safetensors", {"w": 3_000_000_000_000})
    spec = resolve(encoder_folder("bert", "cls"), dtype=dtype)
    with pytest.raises(ModelError) as caught:
        check_room(spec, folder, torch.device("cpu"))
    size = 12_000.0 if dtype == "float32" else 6_000.0
    there = memory_of(torch.device("cpu")) / 1e9
    assert f"its weights take {size:,.1f} GB in {dtype}, and cpu has {there:,.1f} GB" in str(caught.value)
    assert ("bfloat16, which takes half" in str(caught.value)) == (dtype == "float32")
    assert "nodes with more memory" in str(caught.value)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", ["minicpm", "gemma2"])
@pytest.mark.parametrize("cuts", [(2,), (3, 5), None])
def test_layers_that_are_cut_off_are_not_counted(
    tmp_path: Path, kind: str, cuts: tuple[int, ...] | None, pickled: bool
) -> None:
    folder = make_llm_reranker(tmp_path / "m", kind)
    settings = RerankSettings(model=str(folder), cutoff_layers=cuts, max_length=64)
    spec = as_reranker(resolve_reranker(settings, on_gpu=False))
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    how = Loading(torch.float32)
    loaded, _ = family_of(spec).load(spec, folder, how)
    assert count_numbers(folder, spec.layers[-1]) == sum(weight.numel() for weight in loaded.parameters())


def test_a_reranker_that_fits_when_it_is_cut_off(tmp_path: Path) -> None:
    folder = make_llm_reranker(tmp_path / "m", "minicpm")
    asked = RerankSettings(model=str(folder), max_length=64)
    whole, cut = (
        resolve_reranker(asked.model_copy(update={"cutoff_layers": cuts}), on_gpu=False)
        for cuts in ((6,), (5,))
    )
    sizes = {"model.layers.4.w": 1000, "model.layers.5.w": 3_000_000_000_000}  # the fifth, and the sixth
    write_nothing_but_sizes(folder / "model.safetensors", sizes)
    check_room(cut, folder, torch.device("cpu"))
    with pytest.raises(ModelError, match=r"12,000\.0 GB in float32.*an earlier last layer \(rerank\.cutoff"):
        check_room(whole, folder, torch.device("cpu"))


CHILD = """
import sys, threading
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder
from bge_ray.settings.sections import ModelSettings
from transformers import Qwen2Model


def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


spec = resolve_encoder(ModelSettings(name=sys.argv[1], dtype=sys.argv[2]), on_gpu=False)
peak = before = anonymous()
done = threading.Event()


def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())


thread = threading.Thread(target=watch)
thread.start()
model = Model(spec, model_folder(spec), Place())
done.set()
thread.join()
print(peak - before, anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_one_copy_of_the_weights(tmp_path: Path, dtype: str) -> None:
    """Of 180 MB in float32. What is mapped from the file can be dropped, and is not counted."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    folder = make_decoder(tmp_path / "m", "qwen2", **sizes, **heads)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
    )
    peak, after = (int(number) for number in done.stdout.split())
    size = weights_bytes(folder, dtype)
    assert 150e6 < weights_bytes(folder, "float32") < 250e6
    assert 0.8 * size < peak < 1.5 * size and after < 1.3 * size, (peak, after, size)


@pytest.mark.parametrize(
    ("built", "driver", "told"),
    [
        ("13.0", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n", "535.183.01"),
        ("13.0", None, "not installed"),
        (None, None, "CPUs alone"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_refused_with_driver_and_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: str | None, driver: str | None, told: str
) -> None:
    monkeypatch.setattr(memory, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    if driver is not None:
        (tmp_path / "version").write_text(driver)
    check_device(torch.device("cpu"))
    with pytest.raises(ModelError, match="torch sees none") as refused:
        check_device(torch.device("cuda"))
    assert told in str(refused.value)
    assert torch.__version__ in str(refused.value)
    assert built is None or f"CUDA {built}" in str(refused.value)
