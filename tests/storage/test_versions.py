"""By what each kind of store tells one content of an object from the next, and what it lists."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bge_ray.formats.corpus import list_corpus
from bge_ray.records.plan import NO_VERSION
from bge_ray.settings.sections import CorpusSettings
from bge_ray.storage.objects import Storage, join
from tests.support.reading import parquet_bytes, read_all


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, without ranges and without etags, as Python's server does."""

    def log_message(self, *_: object) -> None:
        pass


class Hub(Quiet):
    """Answers what the hub's client asks of one data set with one file; ``oid`` names its content."""

    oid = "1" * 40

    def do_GET(self) -> None:
        revision = {"id": "own/set", "sha": "0" * 40, "siblings": []}
        file = {"type": "file", "oid": self.oid, "size": 7, "path": "data/a.jsonl"}
        answer = json.dumps([file] if "/tree/" in self.path else revision).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        file = {"type": "file", "oid": self.oid, "size": 7, "path": "data/a.jsonl"}
        answer = json.dumps([file]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def serve(handler: object) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def website(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "sub").mkdir()
    rows = [{"id": str(i), "text": f"text {i} " * 50} for i in range(500)]
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(rows, row_group_size=100))
    (tmp_path / "sub" / "b.jsonl").write_text('{"id": "b", "text": "of b"}\n')
    yield from serve(functools.partial(Quiet, directory=str(tmp_path)))


def test_a_web_server_is_a_corpus(storage: Storage, website: str) -> None:
    """Its files have sizes and versions, and rows are right though it knows no ranges."""
    listed = storage.list_files(website)
    assert [info.uri for info in listed] == [f"{website}/a.parquet", f"{website}/sub/b.jsonl"]
    for pattern in ("/a.parquet", "/*.parquet"):
        assert storage.list_files(f"{website}{pattern}") == listed[:1]
    assert storage.list_files(f"{website}/nothing") == []
    for info in listed:
        assert storage.info(info.uri) == info
        assert info.size == len(storage.read(info.uri))
        assert info.version != NO_VERSION
    assert storage.read_range(listed[1].uri, 3, 5) == storage.read(listed[1].uri)[3:5]
    assert read_all(storage, listed[0].uri).ids == [str(i) for i in range(500)]
    assert read_all(storage, listed[1].uri).texts == ["of b"]


def test_the_hub_tells_contents_of_one_size_apart() -> None:
    """By the id of the blob; in a process of its own, because the client reads its endpoint at import."""
    look = (
        "from bge_ray.storage.objects import Storage\nprint(*Storage(5).list_files('hf://datasets/own/set'))"
    )
    found = []
    for oid in ("1" * 40, "2" * 40):
        for endpoint in serve(type("OneHub", (Hub,), {"oid": oid})):
            environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
            ran = subprocess.run(
                [sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, ran.stderr
            found.append(ran.stdout)
    assert [f"version='{str(n) * 40}'" in text and "size=7" in text for n, text in enumerate(found, 1)] == [
        True,
        True,
    ]


def test_another_inode_is_no_other_content(storage: Storage, tmp_path: Path) -> None:
    """Through a mount, and on a node with a copy of its own, only the time is the same; a write shows."""
    first, copy = tmp_path / "a.jsonl", tmp_path / "copy"
    first.write_bytes(b"1234")
    noted = storage.info(str(first))
    copy.write_bytes(first.read_bytes())
    os.utime(copy, ns=(first.stat().st_atime_ns, first.stat().st_mtime_ns))
    copy.replace(first)
    now = storage.info(str(first))
    assert now.etag != noted.etag, "another inode"
    assert now.version == noted.version
    assert now.is_same(noted.size, noted.version)
    assert noted.is_same(noted.size, noted.etag), "plans of before hold the etag"
    storage.write(str(first), b"1235")
    assert not storage.info(str(first)).is_same(noted.size, noted.version)
    assert not now.is_same(noted.size + 1, noted.version)


def test_names_of_folders_are_no_objects(storage: Storage, s3_server, bucket: str) -> None:
    """Consoles and Hadoop leave empty objects of such names; an empty file of another name is one."""
    fs = s3_server.filesystem()
    storage.write(join(bucket, "day/a.jsonl"), b"{}\n")
    storage.write(join(bucket, "day/empty.jsonl"), b"")
    root = bucket.removeprefix("s3://")
    for key in ("day/", "other/", "day_$folder$"):
        bucket_name, _, folder = root.partition("/")
        fs.call_s3("put_object", Bucket=bucket_name, Key=f"{folder}/{key}", Body=b"")
    keys = [o["Key"] for o in fs.call_s3("list_objects_v2", Bucket=bucket_name, Prefix=folder)["Contents"]]
    assert f"{folder}/day/" in keys, "the server keeps them"
    for pattern in ("", "/day", "/**", "/*/*", "/*"):
        found = {info.uri.removeprefix(f"{bucket}/") for info in storage.list_files(f"{bucket}{pattern}")}
        assert found <= {"day/a.jsonl", "day/empty.jsonl"}, pattern
    assert len(storage.list_files(bucket)) == 2
    listed = list_corpus(storage, CorpusSettings(uri=bucket, format="jsonl"))
    assert [info.uri.removeprefix(f"{bucket}/") for info in listed] == ["day/a.jsonl", "day/empty.jsonl"]
