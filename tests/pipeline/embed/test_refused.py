"""What is wrong with the output is known before the corpus is listed, and before a cluster is there."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import CorpusError, DatasetMismatchError, OutputCollisionError
from bge_ray.pipeline.embed.job import embed, plan_only
from bge_ray.pipeline.embed.prepare import _check_given
from bge_ray.records.dataset import make_manifest
from bge_ray.records.plan import Plan, Unit
from bge_ray.settings.sections import parse_settings
from bge_ray.storage.objects import Storage
from bge_ray.storage.reports import write_report
from tests.support.records import make_marker, make_spec


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other_digit(data: bytes) -> bytes:
    changed = data.replace(b'"tokens": 5', b'"tokens": 6')
    assert changed != data
    return changed


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("lease.json", lambda _: b'{"hello":"mine"}'),
        ("_retired.json", lambda _: b'{"hello":"mine"}'),
        ("changes/000001.json", lambda _: b'{"hello":"mine"}'),
        ("plan/000001.json", lambda data: data[:20]),
        ("plan/000002.json", lambda _: b'{"hello":"mine"}'),
        ("manifest.json", lambda _: b"no JSON"),
        ("manifest.json", other_digit),
        ("report.html", lambda data: data[:-1]),
        ("report.json", lambda data: data.swapcase()),
        ("plan", None),
    ],
)
@pytest.mark.parametrize("job", [plan_only, embed])
def test_it_is_named_and_nothing_is_written(
    storage: Storage,
    tmp_path: Path,
    job: Callable[..., object],
    name: str,
    spoil: Callable[[bytes], bytes] | None,
) -> None:
    dataset = Dataset(storage, str(tmp_path / "out"))
    dataset.create_plan(1, Plan((), 4))
    dataset.create_spec(make_spec())
    marker = make_marker(Unit(0, 0, 3), None)
    dataset.publish(make_manifest(make_spec().vector_fingerprint, [marker]))
    write_report(dataset.folder, b"page", b"facts")
    settings = parse_settings(None, [f"corpus.uri={tmp_path}/gone", f"output.uri={dataset.root}"])
    with pytest.raises(CorpusError):
        job(settings)  # which gets as far as that
    path = tmp_path / "out" / name
    if spoil is None:
        shutil.rmtree(path)
    else:
        path.write_bytes(spoil(path.read_bytes() if path.exists() else b""))
    before = everything(tmp_path)
    with pytest.raises((DatasetMismatchError, OutputCollisionError), match=r"restore it|move it away") as it:
        job(settings)
    assert str(path) in str(it.value)
    assert "\n" not in str(it.value)
    assert it.value.exit_code == 2
    assert everything(tmp_path) == before


def test_a_plan_that_is_older_than_the_vectors_gives_no_numbers(storage: Storage, tmp_path: Path) -> None:
    dataset, finished = Dataset(storage, str(tmp_path)), {"x": make_marker(Unit(4, 0, 3), None)}
    _check_given(dataset, 0, None, finished)
    dataset.create_plan(1, Plan((), 4))
    _check_given(dataset, 1, Plan((), 5), finished)
    with pytest.raises(DatasetMismatchError, match=r"vectors of object 4, .* knows of 4 objects"):
        _check_given(dataset, 1, Plan((), 4), finished)
    dataset.create_plan(2, Plan((), 5))
    _check_given(dataset, 1, Plan((), 4), finished)  # another run has planned since


@pytest.mark.parametrize("output", ["model", "model/out"])
@pytest.mark.parametrize("job", [plan_only, embed])
def test_a_model_is_no_output(tmp_path: Path, job: Callable[..., object], output: str) -> None:
    words = [f"corpus.uri={tmp_path}/c", f"model.name={tmp_path}/model", f"output.uri={tmp_path}/{output}"]
    with pytest.raises(OutputCollisionError, match=r"output\.uri.* model\.name"):
        job(parse_settings(None, words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        ("**/*.parquet", r"output\.uri .*/out: lies inside corpus\.uri"),
        # What is foreseen are names, not depths: this one is seen once it is listed.
        ("*/embeddings/*.parquet", r"corpus\.uri: lists .*/00000077-0000000000\.parquet, .* output\.uri"),
    ],
)
@pytest.mark.parametrize("job", [plan_only, embed])
def test_a_glob_that_reaches_the_output_is_refused(
    tmp_path: Path, job: Callable[..., object], corpus: str, said: str
) -> None:
    """Each run would embed what the one before wrote."""
    (tmp_path / "out/embeddings").mkdir(parents=True)
    (tmp_path / "out/embeddings/00000077-0000000000.parquet").write_bytes(b"theirs or ours")
    before = everything(tmp_path)
    settings = parse_settings(None, [f"corpus.uri={tmp_path}/{corpus}", f"output.uri={tmp_path}/out"])
    with pytest.raises(OutputCollisionError, match=said) as caught:
        job(settings)
    assert caught.value.exit_code == 2
    assert everything(tmp_path) == before
