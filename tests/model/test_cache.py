"""A model in object storage is fetched once a node, whole or not at all, and its hash is computed once."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from bge_ray.errors import ModelError
from bge_ray.model import source
from bge_ray.model.cache import cache_folder
from bge_ray.model.source import fetch_model, hash_model
from bge_ray.storage.objects import Storage, join
from tests.model.conftest import MakeModel, load, resolve, vectors
from tests.support.proxy import Fault, FaultyProxy

pytestmark = pytest.mark.long

CHILD = """
import sys
from bge_ray.model.source import fetch_model, hash_model
folder, _ = fetch_model(sys.argv[1], None)
print(folder, hash_model(folder))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BGE_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def upload(folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            Storage(20).write(join(uri, path.relative_to(folder).as_posix()), path.read_bytes())


def start_child(uri: str, endpoint: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, uri],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"AWS_ENDPOINT_URL": endpoint},
        cwd=Path(__file__).parents[2],
    )


def test_processes_at_once_fetch_once(
    tiny_model: Path, bucket: str, faulty: Callable[[Fault], FaultyProxy]
) -> None:
    upload(tiny_model, f"{bucket}/model")
    Storage(20).write(f"{bucket}/model/onnx/model.onnx", b"x")
    proxy = faulty(lambda *_: "")
    children = [start_child(f"{bucket}/model", proxy.url) for _ in range(3)]
    answers = {child.communicate(timeout=120)[0] for child in children}
    assert all(child.returncode == 0 for child in children)
    assert len(answers) == 1, "each has the same folder and the same hash"
    folder, digest = answers.pop().split()
    fetched = [path for method, path in proxy.requests if method == "GET" and "safetensors" in path]
    assert len(fetched) == 1
    assert digest == hash_model(tiny_model)
    ours = {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}
    there = {p.relative_to(tiny_model).as_posix() for p in tiny_model.rglob("*") if p.is_file()}
    assert ours == there - {"2_Normalize/config.json"}


def test_half_fetched_is_never_used(
    tiny_model: Path, bucket: str, cache: Path, faulty: Callable[[Fault], FaultyProxy]
) -> None:
    upload(tiny_model, f"{bucket}/model")
    reached = threading.Event()

    def slow(_: int, method: str, path: str) -> str:
        if method != "GET" or "safetensors" not in path:
            return ""
        reached.set()
        return "slow"

    child = start_child(f"{bucket}/model", faulty(slow).url)
    assert reached.wait(60)
    child.kill()
    child.communicate()
    [partial] = (cache / "models").iterdir()
    assert partial.name.endswith(".partial")
    (partial / "tokenizer.json").write_text("{")
    folder, _ = fetch_model(f"{bucket}/model", None)
    assert [folder] == list((cache / "models").iterdir())
    assert hash_model(folder) == hash_model(tiny_model)


def test_another_version_is_another_folder(encoder_folder: MakeModel, bucket: str) -> None:
    uri = f"{bucket}/model/"
    upload(encoder_folder("bert", "cls"), uri)
    first, _ = fetch_model(uri, None)
    assert fetch_model(uri, None)[0] == first
    Storage(20).write(f"{uri}1_Pooling/config.json", b'{"pooling_mode": "mean"}')
    second, _ = fetch_model(uri, None)
    assert second != first and hash_model(second) != hash_model(first)


def test_a_model_in_storage_makes_the_vectors_of_its_folder(encoder_folder: MakeModel) -> None:
    from bge_ray.model.spec import text_feeder
    from tests.model.conftest import run

    folder = encoder_folder("bert", "mean")
    uri = "memory://models/tiny"
    upload(folder, uri)
    found = []
    for name in (folder, uri):
        spec = resolve(Path(name)) if name == folder else source_spec(uri)
        found.append(vectors(run(load(spec), text_feeder(spec).passages(["the quick brown fox"]))))
    assert found[0].tobytes() == found[1].tobytes()
    # This store has neither etags nor times; a change of the same size is seen all the same.
    before, _ = fetch_model(uri, None)
    config = (before / "config.json").read_bytes()
    Storage(20).write(f"{uri}/config.json", config.replace(b"512", b"256"))
    after, _ = fetch_model(uri, None)
    assert after != before
    fsspec.filesystem("memory").store.clear()


def source_spec(uri: str):
    from bge_ray.model.spec import resolve_encoder
    from bge_ray.settings.sections import ModelSettings

    return resolve_encoder(ModelSettings(name=uri), on_gpu=False)


def test_what_is_not_there_names_the_setting(bucket: str) -> None:
    for setting in ("model.name", "rerank.model"):
        with pytest.raises(ModelError, match=rf"{setting} {bucket}/none: there is no folder"):
            fetch_model(f"{bucket}/none", None, setting)
        with pytest.raises(ModelError, match=rf"{setting} ftpx://x/y: .*ftpx"):
            fetch_model("ftpx://x/y", None, setting)
        with pytest.raises(ModelError, match=f"{setting} /no/such: no such folder"):
            fetch_model("/no/such", None, setting)


def test_a_hash_is_computed_once_a_node(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    (folder / "config.json").touch()
    digest = hash_model(folder)
    kept = cache / "hashes"
    assert not kept.exists(), "its files have just changed, and may again without another time"
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 60, time.time() - 60))
    assert hash_model(folder) == digest
    [entry] = kept.iterdir()
    assert entry.read_text() == digest
    entry.write_text("what was kept")
    assert hash_model(folder) == "what was kept", "it was computed again"
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b"\n")
    assert hash_model(folder) not in (digest, "what was kept")


def test_only_what_decides_an_output_is_hashed(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    digest = hash_model(folder)
    for name in ("trainer_state.json", "README.md", "all_results.json", "requirements.txt", "code.py"):
        (folder / name).write_text("{}")
    assert hash_model(folder) == digest
    for name in source.DECISIVE_FILES:
        path = folder / name.replace("*", "extra")
        if not path.exists():
            path.write_bytes(b"{}")
            assert hash_model(folder) != digest, name
            path.unlink()
    assert hash_model(folder) == digest
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoModel": "code.Model"},', 1))
    named = hash_model(folder)
    (folder / "code.py").write_text("other code")
    assert hash_model(folder) not in (digest, named), "code that the configuration names decides"


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, xdg, home = tmp_path / "asked", tmp_path / "xdg", tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(xdg))
    monkeypatch.setenv("BGE_RAY_CACHE", str(asked))
    assert cache_folder() == asked and asked.is_dir()
    monkeypatch.delenv("BGE_RAY_CACHE")
    assert cache_folder() == xdg / "bge-ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == home / ".cache" / "bge-ray"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"bge-ray-{os.getuid()}"
    monkeypatch.setenv("BGE_RAY_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(ModelError, match=r"BGE_RAY_CACHE .*cannot be written"):
        cache_folder()
