"""No secret leaves the environment, no pickle runs anything, nothing listens beyond this machine.

The secrets are canaries: values that are found wherever they end up, also inside Parquet, zstd and base64.
"""

import ast
import base64
import fnmatch
import gzip
import pickle
import re
import secrets
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
import zstandard

from bge_ray.dataset.commit import ShardWriter
from bge_ray.errors import BgeRayError, ModelError, SettingsError
from bge_ray.index.factory import Metric, check_factory
from bge_ray.model.run.load import Loading, load_encoder
from bge_ray.model.source import FILE_PATTERNS, fetch_model
from bge_ray.model.spec import resolve_encoder
from bge_ray.pipeline.embed.tasks import EmbedJob
from bge_ray.pipeline.engine.model_stage import ModelJob, ModelStage
from bge_ray.pipeline.index.steps import Build
from bge_ray.pipeline.runs.groups import Workplace
from bge_ray.pipeline.search.stages import QueryJob
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec, Manifest
from bge_ray.report.facts import RunFacts
from bge_ray.settings.sections import ModelSettings, Settings, parse_settings
from bge_ray.storage.lease import Lease
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import open_folder
from tests.support.corpora import docstrings, jsonl_bytes, parquet_bytes
from tests.support.proxy import FaultyProxy
from tests.support.runs import REPOSITORY, JobProcess
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server

PARQUET_MAGIC, ZSTD_MAGIC, GZIP_MAGIC = b"PAR1", b"\x28\xb5\x2f\xfd", b"\x1f\x8b"
STORAGE = Storage(20)


def canary(name: str) -> str:
    return f"canary-{name}-{secrets.token_hex(12)}"


def planted() -> dict[str, str]:
    """Return environment variables that hold secrets; the S3 server takes its own pair of keys only."""
    return {
        "HF_TOKEN": f"hf_{canary('hub')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": canary("ray"),
        "GOOGLE_API_KEY": canary("google"),
        "AZURE_STORAGE_CONNECTION_STRING": canary("azure"),
    }


def forms(secret: str) -> list[bytes]:
    """Return what a secret looks like as text, in a URL, and in base64 wherever it stands in a text."""
    found = [secret.encode(), quote(secret, safe="").encode()]
    for offset in range(3):
        encoded = base64.b64encode(b"x" * offset + secret.encode() + b"x" * 3)
        found.append(encoded[4 : len(encoded) - 8])  # the letters that do not depend on what is around
    return found


def unpacked(data: bytes) -> Iterator[bytes]:
    """Yield data, and what is inside it where it is Parquet or compressed."""
    yield data
    if data.startswith(PARQUET_MAGIC):
        table = pq.read_table(pa.BufferReader(data))
        yield repr(table.to_pylist()).encode()
        yield repr(table.schema.metadata).encode()
    elif data.startswith(GZIP_MAGIC):
        yield gzip.decompress(data)
    elif data.startswith(ZSTD_MAGIC):
        yield zstandard.ZstdDecompressor().decompressobj().decompress(data)


def leaks(contents: dict[str, bytes], secret_values: list[str]) -> list[str]:
    """Return the names of contents that hold any of the secrets, with the secret."""
    wanted = [(secret, form) for secret in secret_values for form in forms(secret)]
    return [
        f"{name}: {secret}"
        for name, data in contents.items()
        for piece in unpacked(data)
        for secret, form in wanted
        if form in piece
    ]


def files_below(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found[str(path)] = path.read_bytes()
    return found


def objects_below(uri: str) -> dict[str, bytes]:
    fs = s3_client()
    return {name: fs.cat_file(name) for name in fs.find(uri)}  # hidden ones, too


def s3_client():
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Ray's folder of the run at hand; short, because Ray puts sockets there."""
    folder = Path(tempfile.mkdtemp(prefix="sec-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Watch:
    """Looks at a job's processes while it runs: their command lines, and the addresses they listen on."""

    def __init__(self, run: JobProcess) -> None:
        self._run = run
        self.commands: set[str] = set()
        self.addresses: set[str] = set()
        self.listeners: set[str] = set()

    def until_it_ends(self) -> int:
        while self._run.process.poll() is None:
            for process in [psutil.Process(self._run.process.pid), *self._run.children()]:
                try:
                    self._look(process)
                except psutil.Error:
                    continue
            time.sleep(0.1)
        return self._run.wait()

    def _look(self, process: psutil.Process) -> None:
        command = " ".join(process.cmdline())
        self.commands.add(command)
        for connection in process.net_connections("inet"):
            if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and connection.laddr:
                self.addresses.add(connection.laddr.ip)
                self.listeners.add(process.name())


def test_a_canary_is_found_wherever_it_hides(tmp_path: Path) -> None:
    """The scanner that the other tests rely on can fail."""
    secret = canary("scan")
    text = f"before {secret} after"
    contents = {
        "text": text.encode(),
        "url": quote(secret, safe="").encode(),
        "gzip": gzip.compress(text.encode()),
        "zstd": zstandard.compress(text.encode()),
        "parquet": parquet_bytes([{"id": "1", "text": text}]),
        **{f"base64-{n}": base64.b64encode(b"y" * n + text.encode()) for n in range(3)},
    }
    assert {line.partition(":")[0] for line in leaks(contents, [secret])} == set(contents)
    assert leaks({"clean": b"nothing"}, [secret]) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", ["s3", "local"])
def test_a_run_leaves_no_secret_anywhere_and_listens_on_loopback_only(
    place: str,
    bucket: str,
    s3_server: S3Server,
    tiny_model: Path,
    tmp_path: Path,
    ray_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What the tests set for this machine is left out: the product's own choice is on trial.
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    root = bucket if place == "s3" else str(tmp_path / "data")
    bad = [{"id": f"bad-{i}", "text": " "} for i in range(3)]
    STORAGE.write(f"{root}/corpus/a.jsonl", jsonl_bytes(docstrings(60) + bad))
    STORAGE.write(f"{root}/corpus/b.parquet", parquet_bytes(docstrings(120)[60:]))
    keys = {"corpus.uri": f"{root}/corpus", "output.uri": f"{root}/out", "model.name": tiny_model}
    keys |= {"resources.num_encoders": 2, "batching.unit_rows": 30, "corpus.max_rejected_fraction": 1}
    keys |= {"index.build": "true"}
    environment = planted() | {"RAY_TMPDIR": str(ray_folder), "HOME": str(tmp_path / "home")}
    environment["BGE_RAY_KEEP_SESSION"] = "1"  # whose logs are searched, too
    if place == "local":  # where no server is asked whether they are right
        environment |= {
            "AWS_ACCESS_KEY_ID": canary("id"),
            "AWS_SECRET_ACCESS_KEY": canary("key"),
            "AWS_SESSION_TOKEN": canary("session"),
        }
    (tmp_path / "home").mkdir()
    run = JobProcess(tmp_path / "log", keys, "--log-format", "json", environment=environment)
    watch = Watch(run)
    assert watch.until_it_ends() == 0, run.log()

    contents = files_below(ray_folder) | files_below(tmp_path) | objects_below(f"{bucket}/out")
    contents |= {f"command line {n}": c.encode() for n, c in enumerate(watch.commands)}
    sessions = [name for name in contents if "/logs/" in name]
    assert len(sessions) > 10
    assert any(name.endswith("report.html") for name in contents)
    assert sum(data.startswith(PARQUET_MAGIC) for data in contents.values()) >= 5
    secret_values = [*planted_values(environment), ACCESS_KEY, SECRET_KEY]
    assert leaks(contents, secret_values) == []

    assert {"gcs_server", "raylet"} <= watch.listeners
    assert watch.addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def planted_values(environment: dict[str, str]) -> list[str]:
    return [value for value in environment.values() if "canary-" in value]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("failure", ["wrong keys", "refused writes", "no such model", "no such bucket"])
def test_a_failing_run_leaves_no_secret_either(
    failure: str, bucket: str, s3_server: S3Server, tiny_model: Path, tmp_path: Path, ray_folder: Path
) -> None:
    STORAGE.write(f"{bucket}/corpus/a.jsonl", jsonl_bytes(docstrings(20)))
    keys = {"corpus.uri": f"{bucket}/corpus", "output.uri": f"{bucket}/out", "model.name": tiny_model}
    keys |= {"resources.num_encoders": 1, "output.storage_timeout_s": 3}
    environment = planted() | {"RAY_TMPDIR": str(ray_folder)}
    refuse_writes = FaultyProxy(
        s3_server.endpoint, lambda _, method, path: "403" if method in ("PUT", "POST") else ""
    )
    with refuse_writes as proxy:
        if failure == "wrong keys":
            wrong = {"AWS_ACCESS_KEY_ID": canary("id"), "AWS_SECRET_ACCESS_KEY": canary("key")}
            environment |= wrong | {"AWS_SESSION_TOKEN": canary("session")}
        elif failure == "refused writes":
            environment["AWS_ENDPOINT_URL"] = proxy.url
        elif failure == "no such model":
            keys["model.name"] = "nobody/no-such-model"
            environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
            environment["HF_HOME"] = str(tmp_path / "hub")
        else:
            keys["output.uri"] = "s3://no-such-bucket-of-ours/out"
        run = JobProcess(tmp_path / "log", keys, environment=environment)
        watch = Watch(run)
        code = watch.until_it_ends()
    assert code in (1, 2), run.log()
    words = {
        "wrong keys": "cannot list|refused|credentials",
        "refused writes": "access refused",
        "no such model": "the model hub cannot be reached",
        "no such bucket": "no-such-bucket-of-ours",
    }
    assert re.search(words[failure], run.log()), run.log()
    contents = files_below(ray_folder) | files_below(tmp_path) | objects_below(bucket)
    contents |= {f"command line {n}": c.encode() for n, c in enumerate(watch.commands)}
    assert leaks(contents, [*planted_values(environment), ACCESS_KEY, SECRET_KEY]) == []


def test_an_exception_does_not_tell_the_keys(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"AWS_ACCESS_KEY_ID": canary("id"), "AWS_SECRET_ACCESS_KEY": canary("key")}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(BgeRayError) as caught:
            Storage(2).read(f"{bucket}/x")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    whole = "".join(traceback.format_exception(caught.value)).encode() + repr(caught.value).encode()
    assert leaks({"exception": whole}, list(wrong.values())) == []


def test_what_goes_to_other_processes_carries_no_secret(
    bucket: str, s3_server: S3Server, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = planted()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    storage = Storage(20)
    storage.write(f"{bucket}/x", b"1")  # a client with credentials exists in this process now
    model = resolve_encoder(ModelSettings(name=str(tiny_model)), on_gpu=False)
    spec = DatasetSpec(model, Columns("id", "text", None))
    ledger: Any = None  # Ray's own handle
    place = Workplace(storage, bucket, 3, ledger)
    manifest = Manifest(spec.vector_fingerprint, 0, 0, 0, 0, 0, 0, ())
    index_spec = check_factory("Flat", 32, Metric.L2)
    folder = open_folder(storage, f"{bucket}/index", "index", "output.uri")
    shipped = {
        "settings": parse_settings(None, [f"corpus.uri={bucket}", f"output.uri={bucket}/out"]),
        "embed": EmbedJob(storage, bucket, spec, "zstd", False, 3, ledger, "object"),
        "model": ModelJob("encode", model, "cpu", 1, 1024, False, ledger, 3),
        "model stage": ModelStage,
        "search": QueryJob(place, model, None, (), False),
        "writer": ShardWriter(storage, bucket, spec, "zstd"),
        "index": Build(
            folder,
            bucket,
            manifest,
            index_spec,
            10,
            0,
            False,
            Settings().index,
            1,
            dict,
            RunFacts("index", "run"),
            1.0,
        ),
    }
    pickled = {name: ray.cloudpickle.dumps(thing) for name, thing in shipped.items()}
    assert leaks(pickled, [*planted_values(environment), ACCESS_KEY, SECRET_KEY]) == []
    # The check can fail: a client, which must never be shipped, does carry them.
    assert leaks({"client": ray.cloudpickle.dumps(s3_server.filesystem())}, [SECRET_KEY]) != []
    with Lease(storage, f"{bucket}/leased") as lease:
        lease.check()
        there = objects_below(bucket)
        assert leaks(there, [*planted_values(environment), ACCESS_KEY, SECRET_KEY]) == []
        assert any("lease.json" in name for name in there)


URIS_WITH_SECRETS = [
    "s3://AKIA:{}@bucket/corpus",
    "s3://AKIA:a/b+{}@bucket/corpus",
    "https://user:{}@host/corpus",
    "filecache::s3://key:{}@bucket/corpus",
    "https://account.blob.core.windows.net/c/corpus?sv=2024&sig={}",
    "https://bucket.s3.amazonaws.com/corpus?X-Amz-Signature={}",
]
URIS_WITHOUT = [
    "s3://bucket/a:b/c@d",
    "abfss://container@account.dfs.core.windows.net/path",
    "hdfs://host:8020/a@b",
    "file:///a:b@c",
    "s3://bucket/part-?.parquet",
]


@pytest.mark.parametrize("template", URIS_WITH_SECRETS)
@pytest.mark.parametrize("way", ["--set", "document", "broken document", "--config", "stray"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(
    template: str, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from bge_ray.command import run_job
    from bge_ray.jobs import JOBS

    secret = canary("uri")
    uri = template.format(secret)
    said = ""
    if "document" in way:
        broken = "\n  ]broken: {" if way == "broken document" else ""
        with pytest.raises(SettingsError) as caught:
            parse_settings(f"corpus:\n  uri: {uri}{broken}", origin="embed.yaml")
        said = "".join(traceback.format_exception(caught.value))
        assert str(caught.value).startswith("embed.yaml: holds a URI with credentials")
    else:
        words = {"--set": ["--set", f"corpus.uri={uri}"], "--config": ["--config", uri], "stray": [uri]}[way]
        assert run_job(JOBS[0], words) == 2
        said = "".join(capfd.readouterr())
        assert "holds a URI with credentials" in said
        assert ("corpus.uri: holds" in said) == (way == "--set")
    assert secret not in said


@pytest.mark.parametrize("uri", URIS_WITHOUT)
def test_other_uris_pass(uri: str) -> None:
    assert parse_settings(None, [f"corpus.uri={uri}"]).corpus.uri == uri


class Bomb:
    """Unpickling one creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "training_args.bin", "model.pt"])
def test_a_pickle_in_a_model_folder_runs_nothing(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder, boom = tmp_path / "model", tmp_path / "boom"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(boom)))
    with pytest.raises(ModelError, match=r"has no weights|cannot be loaded|refused, |no whole safetensors"):
        spec = resolve_encoder(ModelSettings(name=str(folder)), on_gpu=False)
        import torch

        load_encoder(Path(spec.name), Loading(torch.float32))
    assert not boom.exists()


def test_a_pickle_beside_the_weights_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    folder, boom = tmp_path / "model", tmp_path / "boom"
    shutil.copytree(tiny_model, folder)
    names = ("pytorch_model.bin", "optimizer.pt", "tokenizer.pkl", "training_args.bin")
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Bomb(boom)))
    spec = resolve_encoder(ModelSettings(name=str(folder)), on_gpu=False)
    load_encoder(fetch_model(spec.name, None)[0], Loading(torch.float32))
    assert not boom.exists()
    assert not any(fnmatch.fnmatch(name, pattern) for name in names for pattern in FILE_PATTERNS)


PICKLING = {"pickle", "cloudpickle", "_pickle", "dill", "joblib", "marshal", "shelve", "ray.cloudpickle"}
# As `name.attribute`; the first reads any pickle unless told otherwise, the others always.
READERS = {"torch.load", "pandas.read_pickle", "pd.read_pickle", "np.lib.format.read_array"}


def unsafe_reads(source: str) -> list[str]:
    """Return the places in Python source that could read a pickle, but with torch's restricted reader."""
    found = []
    nodes = list(ast.walk(ast.parse(source)))
    restricted = {
        id(node.func) for node in nodes if isinstance(node, ast.Call) and says(node, "weights_only")
    }
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in PICKLING]
        elif isinstance(node, ast.ImportFrom) and node.module in PICKLING:
            found += [alias.name for alias in node.names if alias.name != "UnpicklingError"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in READERS:
            found += [] if id(node) in restricted else [ast.unparse(node)]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(node.arg)
        elif isinstance(node, ast.keyword) and node.arg == "weights_only":
            found += [] if ast.unparse(node.value) == "True" else [node.arg]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
            loads_weights = "Tokenizer" not in ast.unparse(node.func) and "Config" not in ast.unparse(
                node.func
            )
            if loads_weights and not (says(node, "use_safetensors") or says(node, "weights_only")):
                found.append(ast.unparse(node.func))
    return found


def says(call: ast.Call, keyword: str) -> bool:
    """Tell whether a call passes True for a keyword."""
    return any(k.arg == keyword and ast.unparse(k.value) == "True" for k in call.keywords)


def test_no_code_of_the_product_reads_a_pickle() -> None:
    product = [p for folder in ("bge_ray", "jobs", "infra") for p in (REPOSITORY / folder).rglob("*.py")]
    assert len(product) > 60
    # The bench runs other people's encoders as their users do; it reads no storage.
    product = [p for p in product if "bench" not in p.parts]
    found = {str(p.relative_to(REPOSITORY)): unsafe_reads(p.read_text()) for p in product}
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from ray.cloudpickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\nread = torch.load",
        "from pickle import UnpicklingError, load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x')",
        "AutoModel.from_pretrained('x', use_safetensors=None)",
        "AutoModel.from_pretrained('x', use_safetensors=False, weights_only=False)",
    ],
)
def test_the_search_for_pickles_finds_them(source: str) -> None:
    assert unsafe_reads(source)


def test_settings_have_no_place_for_a_secret() -> None:
    words = re.compile(r"secret|password|passwd|api_key|access_key|auth|credential|(^|_)token($|_(?!budget))")
    names = [f"{section}.{key}" for section, keys in Settings().model_dump().items() for key in keys]
    # What texts of an LLM embedder end with.
    assert [n for n in names if words.search(n.rpartition(".")[2])] == ["model.last_token"]
