"""What an m3 folder must hold for what is asked of it; known before anything is loaded."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bge_ray.errors import DatasetMismatchError, ModelError
from bge_ray.model.canary import check_canaries, make_canaries
from bge_ray.model.source import fetch_model
from bge_ray.model.spec import text_feeder
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.model import ModelSpec
from bge_ray.storage.objects import Storage, join
from tests.model.conftest import MakeModel, load, resolve
from tests.support.models import make_m3

ALL = ("embedding", "sparse", "colbert")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_m3(tmp_path_factory.mktemp("m3") / "made", colbert_dim=24)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def fingerprint(spec: ModelSpec) -> str:
    return DatasetSpec(spec, Columns("id", "text", None)).vector_fingerprint


def test_dense_vectors_alone_are_those_of_any_encoder(made: Path, copy: Path) -> None:
    """So data sets made before the heads were known stay what they are, and other heads change nothing."""
    dense = resolve(made)
    assert (dense.family, [o.name for o in dense.outputs]) == ("dense", ["embedding"])
    for name in ("sparse_linear", "colbert_linear"):
        (copy / f"{name}.safetensors").write_bytes(b"damaged")
    assert fingerprint(resolve(copy)) == fingerprint(dense)
    for name in ("sparse_linear", "colbert_linear"):
        (copy / f"{name}.safetensors").unlink()
    assert fingerprint(resolve(copy)) == fingerprint(dense)


def test_each_head_decides_its_own_output(made: Path, copy: Path) -> None:
    linear = torch.nn.Linear(32, 24)
    save_file(linear.state_dict(), copy / "colbert_linear.safetensors")
    for asked, same in ((("embedding", "sparse"), True), (ALL, False), (("colbert",), False)):
        assert (
            fingerprint(resolve(made, outputs=asked)) == fingerprint(resolve(copy, outputs=asked))
        ) == same
    spec = resolve(made, outputs=ALL)
    with pytest.raises(
        ModelError, match=r"colbert_linear.* differs from the one that the run was planned with"
    ):
        load(dataclasses.replace(spec, name=str(copy)))
    assert len({fingerprint(resolve(made, outputs=asked)) for asked in (ALL, ALL[:2], ALL[1:], ALL[:1])}) == 4


def test_an_output_without_its_head_is_refused_by_name(copy: Path, encoder_folder: MakeModel) -> None:
    (copy / "colbert_linear.safetensors").unlink()
    assert [o.name for o in resolve(copy, outputs=ALL[:2]).outputs] == ["embedding", "sparse"]
    with pytest.raises(ModelError, match=r"colbert needs colbert_linear\.safetensors or colbert_linear\.pt"):
        resolve(copy, outputs=ALL)
    other = encoder_folder("bert", "cls")
    with pytest.raises(
        ModelError, match=r"has no colbert and no sparse; .*colbert_linear\.pt.*sparse_linear\.pt"
    ):
        resolve(other, outputs=ALL)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"weight": torch.zeros(24, 31), "bias": torch.zeros(24)}, r"holds bias \[24\], weight \[24, 31\]"),
        ({"weight": torch.zeros(24, 32), "bias": torch.zeros(23)}, r"weight \[n, 32\] and bias \[n\]"),
        ({"weight": torch.zeros(24, 32)}, r"holds weight \[24, 32\]"),
        ({"weight": torch.zeros(24), "bias": torch.zeros(24)}, r"holds bias \[24\], weight \[24\]"),
        ({}, "holds nothing"),
    ],
)
def test_a_misshaped_head_is_refused(copy: Path, tensors: dict[str, torch.Tensor], told: str) -> None:
    save_file(tensors, copy / "colbert_linear.safetensors")
    with pytest.raises(ModelError, match=told):
        resolve(copy, outputs=("colbert",))


def test_weights_of_two_numbers_are_refused(copy: Path) -> None:
    save_file(torch.nn.Linear(32, 2).state_dict(), copy / "sparse_linear.safetensors")
    with pytest.raises(ModelError, match="gives 2 numbers a token"):
        resolve(copy, outputs=("sparse",))


def test_a_pickle_that_holds_more_than_tensors_is_refused(copy: Path) -> None:
    (copy / "sparse_linear.safetensors").unlink()
    torch.save(torch.nn.Linear(32, 1), copy / "sparse_linear.pt")
    with pytest.raises(ModelError, match=r"sparse_linear\.pt: refused, torch's restricted reader"):
        resolve(copy, outputs=("sparse",))


def test_heads_are_fetched_and_are_no_weights_of_the_model(copy: Path, bucket: str) -> None:
    """A folder with converted heads and a pickled model, as one that was made from the published files."""
    from safetensors.torch import load_file

    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    (copy / "sparse_linear.safetensors").unlink()
    torch.save(torch.nn.Linear(32, 1).state_dict(), copy / "sparse_linear.pt")
    for path in copy.rglob("*"):
        if path.is_file():
            Storage(20).write(join(bucket, path.relative_to(copy).as_posix()), path.read_bytes())
    folder, _ = fetch_model(bucket, None)
    names = {path.name for path in folder.iterdir()}
    assert {"pytorch_model.bin", "sparse_linear.pt", "colbert_linear.safetensors"} <= names
    assert fingerprint(resolve(folder, outputs=ALL)) == fingerprint(resolve(copy, outputs=ALL))


def test_pooling_is_cls_where_no_file_says_so(copy: Path) -> None:
    shutil.rmtree(copy / "1_Pooling")
    (copy / "modules.json").unlink()
    assert resolve(copy, outputs=ALL).pooling == "cls"


def test_canaries_are_of_every_output(made: Path, copy: Path) -> None:
    spec = resolve(made, outputs=ALL)
    model, feeder = load(spec), text_feeder(spec)
    stored = make_canaries(model, feeder)
    assert {(c.output, len(c.vector)) for c in stored} == {
        ("embedding", 32),
        ("sparse", 256),
        ("colbert", 24),
    }
    check_canaries(stored, model, feeder)
    half = resolve(made, outputs=ALL, dtype="float16")
    check_canaries(stored, load(half), feeder)
    check_canaries(stored, load(spec.only("embedding")), feeder)  # as a search does
    for name in ("sparse_linear", "colbert_linear"):
        save_file(
            torch.nn.Linear(32, 1 if "sparse" in name else 24).state_dict(), copy / f"{name}.safetensors"
        )
    other = load(resolve(copy, outputs=ALL))
    with pytest.raises(DatasetMismatchError, match="makes other vectors: sparse of"):
        check_canaries([c for c in stored if c.output == "sparse"], other, feeder)
    with pytest.raises(DatasetMismatchError, match="makes other vectors: colbert of"):
        check_canaries([c for c in stored if c.output == "colbert"], other, feeder)
