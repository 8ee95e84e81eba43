"""Storage: all or nothing, exclusive creation, patience where it helps and none where it does not."""

import errno
import io
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ray.errors import StorageAccessError, StorageError
from bge_ray.storage.objects import TEMPORARY_SUFFIX, Storage, join
from tests.support.slow import slow_but

pytestmark = pytest.mark.long

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["s3fs", "bge_ray.dataset.folder", "bge_ray.dataset.commit"])


def names(storage: Storage, uri: str, root: str) -> list[str]:
    return [info.uri.rpartition(f"{root.rpartition('/')[2]}/")[2] for info in storage.list_files(uri)]


def test_what_is_written_is_read(storage: Storage, root: str) -> None:
    uri = join(root, "a", "b.bin")
    for data in (b"", b"first", bytes(range(256)) * 1000):
        storage.write(uri, data)
        assert storage.read(uri) == storage.read_optional(uri) == data
        assert storage.info(uri).size == len(data)
    assert storage.read_range(uri, 1, 5) == bytes([1, 2, 3, 4])
    assert storage.read_range(uri, 255_999, 300_000) == b"\xff"
    assert storage.read_range(uri, 256_000, 300_000) == b""
    assert storage.read_range(uri, 5, 5) == b""
    storage.delete([uri, uri])
    assert storage.read_optional(uri) is None
    assert storage.info(uri) is None


def test_create_is_exclusive(storage: Storage, root: str) -> None:
    uri = join(root, "once.json")
    assert storage.create(uri, b"mine")
    assert storage.create(uri, b"mine"), "the same bytes are what a retry finds after a lost answer"
    assert not storage.create(uri, b"yours")
    assert storage.read(uri) == b"mine"
    storage.delete([uri])
    assert storage.create(uri, b"yours")


def test_one_of_many_threads_creates(storage: Storage, root: str) -> None:
    for turn in range(5):
        uri = join(root, f"race-{turn}")
        contents = [f"writer {i}".encode() * 1000 for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(storage.create, [uri] * len(contents), contents))
        assert sum(won) == 1
        assert storage.read(uri) == contents[won.index(True)]


def _create_many(root: str, who: int, gate, results) -> None:
    storage = Storage(timeout_s=20.0)
    storage.info(root)
    gate.wait()
    results.put((who, [storage.create(join(root, f"{i:03d}"), f"process {who}".encode()) for i in range(20)]))


def test_one_of_many_processes_creates(storage: Storage, root: str) -> None:
    gate, results = FORKSERVER.Barrier(3), FORKSERVER.Queue()
    processes = [FORKSERVER.Process(target=_create_many, args=(root, w, gate, results)) for w in range(3)]
    for process in processes:
        process.start()
    won = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    for i in range(20):
        winners = [who for who in won if won[who][i]]
        assert len(winners) == 1
        assert storage.read(join(root, f"{i:03d}")) == f"process {winners[0]}".encode()


def test_replace_and_delete_hit_only_what_was_seen(storage: Storage, root: str) -> None:
    uri = join(root, "a", "b.json")
    assert not storage.replace(uri, b"new", "an etag"), "nothing is there"
    assert storage.info(uri) is None
    assert storage.delete_seen(uri, "an etag"), "nothing is left"
    storage.write(uri, b"first")
    seen = storage.info(uri).etag
    assert storage.replace(uri, b"second", seen)
    assert storage.read(uri) == b"second"
    assert not storage.replace(uri, b"third", seen)
    assert storage.replace(uri, b"second", seen), "the same bytes are what a retry finds after a lost answer"
    assert not storage.delete_seen(uri, seen)
    assert storage.read(uri) == b"second"
    assert storage.delete_seen(uri, storage.info(uri).etag)
    assert storage.info(uri) is None
    assert not storage.replace(uri, b"third", seen)
    assert storage.info(uri) is None


def test_a_store_without_conditions_is_written_as_before(storage: Storage) -> None:
    uri = "memory://conditions/a"
    assert not storage.replace(uri, b"new", "-")
    storage.write(uri, b"first")
    assert storage.replace(uri, b"second", storage.info(uri).etag)
    assert storage.read(uri) == b"second"
    assert not storage.replace(uri, b"third", "another")
    assert not storage.delete_seen(uri, "another")
    assert storage.delete_seen(uri, storage.info(uri).etag)
    assert storage.info(uri) is None


def test_one_of_many_threads_replaces(storage: Storage, root: str) -> None:
    uri = join(root, "a")
    storage.write(uri, b"first")
    for turn in range(8):
        seen = storage.info(uri).etag
        contents = [f"turn {turn} writer {i}".encode() for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(storage.replace, [uri] * 8, contents, [seen] * 8))
        assert sum(won) == 1
        assert storage.read(uri) == contents[won.index(True)]
    if root.startswith("/"):
        assert os.listdir(root) == ["a"], "no lock stays behind"


@pytest.mark.parametrize("kind", slow_but(["lost", "mute", "cut"], ["503", "lost", "mute", "cut"]))
def test_conditions_survive_a_bad_line(storage: Storage, bucket: str, faulty, kind: str) -> None:
    uri = f"{bucket}/a"
    proxy = faulty(lambda number, *_: kind if number % 3 == 0 else "")
    storage.write(uri, b"0")
    for turn in range(1, 6):
        stale, data = storage.info(uri).etag, b"%d" % turn
        assert storage.replace(uri, data, stale)
        assert not storage.replace(uri, b"late", stale)
        assert not storage.delete_seen(uri, stale)
        assert storage.read(uri) == data
    assert storage.delete_seen(uri, storage.info(uri).etag)
    assert storage.info(uri) is None
    assert proxy.faults >= 5


def test_a_replacement_under_way_is_waited_for_and_named(storage: Storage, tmp_path: Path) -> None:
    """The lock is the kernel's: it goes with whoever holds it, and stays with one that was stopped."""
    uri = tmp_path / "a"
    uri.write_bytes(b"first")
    seen = storage.info(str(uri)).etag
    hold = "import sys, time; from pathlib import Path; from bge_ray.storage.objects import _locked\n"
    hold += "with _locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(uri)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(StorageError, match=r"cannot replace .*another process is replacing it"):
            Storage(0.5).replace(str(uri), b"second", seen)
        assert uri.read_bytes() == b"first"
    finally:
        holder.kill()
        holder.wait()
    assert storage.replace(str(uri), b"second", seen)
    assert os.listdir(tmp_path) == ["a"]


FILL = """
import sys
from bge_ray.errors import StorageError
from bge_ray.storage.objects import Storage
try:
    getattr(Storage(timeout_s=30.0), sys.argv[1])(sys.argv[2], b"x" * 4_000_000)
except StorageError as error:
    print(error)
"""


def _fill(operation: str, uri: Path, limit_bytes: int | None = None) -> str:
    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "-c", FILL, operation, str(uri)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=60, check=True)
    assert time.monotonic() - started < 20, "a full disk is not waited for"
    return done.stdout


@pytest.fixture
def full_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_and_says_so(full_disk: Path) -> None:
    for operation in ("write", "create"):
        said = _fill(operation, full_disk / "shard.parquet")
        assert "no space left" in said
        assert "shard.parquet" in said
        assert os.listdir(full_disk) == []
    (full_disk / "shard.parquet").write_bytes(b"old")
    _fill("write", full_disk / "shard.parquet")
    assert (full_disk / "shard.parquet").read_bytes() == b"old"
    assert os.listdir(full_disk) == ["shard.parquet"]


def test_a_write_cut_short_leaves_nothing(tmp_path: Path) -> None:
    said = _fill("create", tmp_path / "big", limit_bytes=1_000_000)
    assert "cannot create" in said
    assert "big" in said
    assert os.listdir(tmp_path) == []


def test_left_over_temporaries_are_hidden_and_removed_when_old(storage: Storage, tmp_path: Path) -> None:
    old, young, other = (
        tmp_path / "sub" / f".a.{name}{suffix}"
        for name, suffix in (("1", TEMPORARY_SUFFIX), ("2", TEMPORARY_SUFFIX), ("3", ".tmp"))
    )
    old.parent.mkdir()
    for path in (old, young, other):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    os.utime(other, (1, 1))
    assert storage.list_files(str(tmp_path)) == []
    assert storage.remove_temporaries(str(tmp_path)) == 1
    assert sorted(os.listdir(old.parent)) == [young.name, other.name]


def test_missing_things_are_named_at_once(storage: Storage, bucket: str, tmp_path: Path) -> None:
    started = time.monotonic()
    for uri in (f"{bucket}/none", "s3://no-such-bucket/none", str(tmp_path / "none")):
        with pytest.raises(StorageError, match="no such object, folder or bucket") as caught:
            storage.read(uri)
        assert uri in str(caught.value)
        assert storage.read_optional(uri) is None
    with pytest.raises(StorageError, match="nosuch"):
        storage.read("nosuch://bucket/a")
    assert storage.list_files(f"{bucket}/none") == []
    assert storage.list_files(str(tmp_path / "none")) == []
    assert time.monotonic() - started < 5


def test_a_refusal_fails_at_once_with_a_hint(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(f"{bucket}/a", b"1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "nobody", "secret": "wrong"})
    started = time.monotonic()
    for operation in (
        lambda: storage.read(f"{bucket}/a"),
        lambda: storage.read_optional(f"{bucket}/a"),
        lambda: storage.read_range(f"{bucket}/a", 0, 1),
        lambda: storage.write(f"{bucket}/a", b"2"),
        lambda: storage.create(f"{bucket}/b", b"2"),
        lambda: storage.info(f"{bucket}/a"),
        lambda: storage.list_files(bucket),
        lambda: storage.delete([f"{bucket}/a"]),
    ):
        with pytest.raises(StorageAccessError, match="check the credentials") as caught:
            operation()
        assert bucket in str(caught.value)
        assert "wrong" not in str(caught.value).split("PermissionError")[0]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("uri", "settings", "refused"),
    [
        ("nosuch://bucket/a", {}, True),
        ("gs://bucket/a", {}, True),  # its client is not installed here
        ("/proc/version", {}, True),  # nobody may write there
        ("{folder}/file/a", {}, True),  # below a file
        ("s3://out/a", {"key": "nobody", "secret": "wrong"}, True),
        ("s3://out/a", {"profile": "nobody"}, True),
        ("s3://out/a", {"endpoint_url": "http://127.0.0.1:9"}, False),
    ],
)
def test_what_no_rerun_mends_is_told_from_what_may_pass(
    s3_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, settings: dict, refused: bool
) -> None:
    (tmp_path / "file").write_text("")
    options = settings | {"config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    with pytest.raises(StorageError) as caught:
        Storage(timeout_s=0.5).write(uri.format(folder=tmp_path), b"1")
    assert isinstance(caught.value, StorageAccessError) == refused, caught.value
    assert caught.value.exit_code == (2 if refused else 1)


WITHOUT_CREDENTIALS = """
import sys
from bge_ray.errors import StorageAccessError
from bge_ray.storage.objects import Storage
try:
    Storage(timeout_s=5).write(sys.argv[1], b"1")
except StorageAccessError as error:
    print(error.exit_code, error)
"""


def test_an_environment_without_credentials_is_refused(s3_server, bucket: str, tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    # What a client looks through for credentials, and the address of the server alone.
    bare |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    bare |= {"AWS_ENDPOINT_URL": s3_server.endpoint, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", WITHOUT_CREDENTIALS, f"{bucket}/a"]
    ended = subprocess.run(words, env=bare, capture_output=True, text=True, check=False)
    assert ended.stdout.startswith("2 "), ended.stderr[-2000:]
    assert f"{bucket}/a" in ended.stdout
    assert "no credentials: set AWS_ACCESS_KEY_ID" in ended.stdout


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with a file of its own, and links to a file and to a folder beside it."""
    folder, beside = tmp_path / "folder", tmp_path / "beside"
    for path in (folder / "deep" / "own.jsonl", beside / "x.jsonl", beside / "more" / "y.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (folder / "file.jsonl").symlink_to(beside / "x.jsonl")
    (folder / "linked").symlink_to(beside, target_is_directory=True)
    (folder / "again.jsonl").symlink_to("file.jsonl")
    return folder


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (
            "",
            "again.jsonl deep/own.jsonl file.jsonl linked/more/y.jsonl linked/x.jsonl",
        ),
        ("/*.jsonl", "again.jsonl file.jsonl"),
        ("/**/*.jsonl", "again.jsonl deep/own.jsonl file.jsonl linked/more/y.jsonl linked/x.jsonl"),
        ("/*/*.jsonl", "deep/own.jsonl linked/x.jsonl"),
        ("/linked", "linked/more/y.jsonl linked/x.jsonl"),
        ("/file.jsonl", "file.jsonl"),
    ],
)
def test_links_are_what_they_lead_to(storage: Storage, linked: Path, pattern: str, expected: str) -> None:
    found = storage.list_files(f"{linked}{pattern}")
    assert [info.uri for info in found] == [f"file://{linked}/{name}" for name in expected.split()]
    assert [info.size for info in found] == [len(storage.read(info.uri)) for info in found]


def test_the_etag_of_a_link_follows_what_it_leads_to(storage: Storage, linked: Path) -> None:
    def etag() -> str:
        [info] = storage.list_files(f"{linked}/file.jsonl")
        return info.etag

    before = etag()
    storage.write(str(linked.parent / "beside" / "x.jsonl"), b"x.jsonk")
    assert etag() != before


@pytest.mark.parametrize("target", ["nowhere", ".", ".."])
def test_a_link_that_leads_nowhere_or_back_is_named(storage: Storage, linked: Path, target: str) -> None:
    (linked / "deep" / "odd").symlink_to(target)
    with pytest.raises(StorageAccessError, match=r"deep/odd\S* is a link that leads (nowhere|back)"):
        storage.list_files(str(linked))


def test_a_bucket_that_is_not_there_is_refused_and_an_object_may_come(storage: Storage, bucket: str) -> None:
    with pytest.raises(StorageAccessError, match="bucket"):
        storage.read("s3://no-such-bucket/a")
    with pytest.raises(StorageError) as caught:
        storage.read(f"{bucket}/none")
    assert caught.value.exit_code == 1


def test_a_full_disk_may_have_room_for_the_next_run(storage: Storage, tmp_path: Path) -> None:
    def full(fs: object, path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="no space left") as caught:
        storage.attempt("write", str(tmp_path / "a"), full)
    assert caught.value.exit_code == 1


def test_a_restarting_server_is_waited_for(storage: Storage, s3_server, bucket: str) -> None:
    storage.write(f"{bucket}/a", b"survives")
    s3_server.kill()
    starter = threading.Timer(1, s3_server.start)
    starter.start()
    with ThreadPoolExecutor(4) as pool:
        read = pool.submit(storage.read, f"{bucket}/a")
        listed = pool.submit(storage.list_files, bucket)
        created = pool.submit(storage.create, f"{bucket}/b", b"new")
        written = pool.submit(storage.write, f"{bucket}/c", b"new")
        assert read.result() == b"survives"
        assert created.result()
        written.result()
        assert f"{bucket}/a" in [info.uri for info in listed.result()]
    starter.join()
    assert storage.read(f"{bucket}/b") == storage.read(f"{bucket}/c") == b"new"


def test_an_unreachable_server_is_given_up_after_the_limit(
    s3_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        fsspec.config.conf,
        "s3",
        {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}},
    )
    started = time.monotonic()
    with pytest.raises(StorageError, match="cannot read s3://out/a"):
        Storage(timeout_s=0.5).read("s3://out/a")
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("kind", ["503", "lost", "mute", "cut"])
def test_every_operation_survives_a_bad_line(storage: Storage, bucket: str, faulty, kind: str) -> None:
    proxy = faulty(lambda number, *_: kind if number % 4 == 0 else "")
    contents = {f"{bucket}/{i}": os.urandom(50_000) for i in range(2)}
    for uri, data in contents.items():
        assert storage.create(uri, data)
        assert not storage.create(uri, b"other")
        assert storage.read(uri) == data
        assert storage.read_range(uri, 100, 40_000) == data[100:40_000]
        assert storage.info(uri).size == len(data)
    storage.write(f"{bucket}/0", b"second")
    contents[f"{bucket}/0"] = b"second"
    assert [(i.uri, i.size) for i in storage.list_files(bucket)] == [(u, len(d)) for u, d in contents.items()]
    storage.delete(list(contents))
    assert storage.list_files(bucket) == []
    assert proxy.faults >= 4


def test_a_large_object_is_created_in_one_request(storage: Storage, bucket: str, faulty) -> None:
    proxy = faulty()
    data = bytes(101 << 20)
    assert storage.create(f"{bucket}/large", data)
    assert [method for method, _ in proxy.requests] == ["PUT"]
    del proxy.requests[:]
    assert storage.read(f"{bucket}/large") == data
    assert [method for method, _ in proxy.requests] == ["GET"]


def test_other_writers_are_seen_at_once(storage: Storage, s3_server, bucket: str) -> None:
    storage.write(f"{bucket}/a", b"1")
    assert len(storage.list_files(bucket)) == 1
    other = s3_server.filesystem()
    other.pipe_file(f"{bucket}/b".removeprefix("s3://"), b"22")
    other.pipe_file(f"{bucket}/a".removeprefix("s3://"), b"333")
    assert storage.read_optional(f"{bucket}/b") == b"22"
    assert storage.info(f"{bucket}/a").size == 3
    assert [i.size for i in storage.list_files(bucket)] == [3, 2]


def test_listings(storage: Storage, root: str) -> None:
    files = ["a/2.jsonl", "a/1.jsonl", "a/deep/3.jsonl", "b/day=1/_x=2/4.jsonl", "b[1]?.csv"]
    hidden = [
        "a/.hidden.jsonl",
        "a/_SUCCESS",
        "a/_temporary/0/part.jsonl",
        ".git/5.jsonl",
        "a/_delta_log/0.json",
    ]
    for name in (*files, *hidden):
        storage.write(join(root, name), name.encode())
    assert names(storage, root, root) == sorted(files)
    assert names(storage, root + "/", root) == sorted(files)
    assert names(storage, join(root, "a"), root) == ["a/1.jsonl", "a/2.jsonl", "a/deep/3.jsonl"]
    assert names(storage, join(root, "a/1.jsonl"), root) == ["a/1.jsonl"]
    assert names(storage, join(root, "a/*.jsonl"), root) == ["a/1.jsonl", "a/2.jsonl"]
    assert names(storage, join(root, "*/**/*.jsonl"), root) == [n for n in sorted(files) if n != "b[1]?.csv"]
    assert names(storage, join(root, "a/_temporary/0/part.jsonl"), root) == ["a/_temporary/0/part.jsonl"]
    assert names(storage, join(root, "b[1]?.csv"), root) == ["b[1]?.csv"]
    assert names(storage, join(root, "none/*.jsonl"), root) == []
    for info in storage.list_files(root):
        assert info == storage.info(info.uri), "a listing and a look give the same etag"


def test_etag_follows_the_content(storage: Storage, root: str) -> None:
    uri = join(root, "a")
    storage.write(uri, b"1")
    first = storage.info(uri)
    assert storage.info(uri) == first
    storage.write(uri, b"2")
    assert storage.info(uri).etag != first.etag


@pytest.fixture(scope="module")
def random_object(s3_server, tmp_path_factory) -> dict[str, tuple[str, bytes]]:
    data = os.urandom(5000)
    uris = {"s3": "s3://out/range-file", "file": str(tmp_path_factory.mktemp("range") / "file")}
    for uri in uris.values():
        Storage(20.0).write(uri, data)
    return {kind: (uri, data) for kind, uri in uris.items()}


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("seek"), st.integers(0, 6000), st.just(io.SEEK_SET)),
        st.tuples(st.just("seek"), st.integers(-6000, 6000), st.just(io.SEEK_CUR)),
        st.tuples(st.just("seek"), st.integers(-5000, 500), st.just(io.SEEK_END)),
        st.tuples(st.just("read"), st.integers(-1, 6000)),
        st.tuples(st.just("readinto"), st.integers(0, 6000)),
    ),
    max_size=8,
)


@pytest.mark.parametrize("kind", ["file", "s3"])
@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_range_file_is_the_bytes(random_object, kind: str, steps: list[tuple]) -> None:
    uri, data = random_object[kind]
    file, truth = Storage(20.0).open(uri, len(data)), io.BytesIO(data)
    for name, *arguments in steps:
        if name == "seek":
            target = {0: 0, 1: truth.tell(), 2: len(data)}[arguments[1]] + arguments[0]
            assert file.seek(*arguments) == truth.seek(max(0, target))
        elif name == "read":
            assert file.read(*arguments) == truth.read(*arguments)
        else:
            mine, its = bytearray(arguments[0]), bytearray(arguments[0])
            assert file.readinto(mine) == truth.readinto(its)
            assert mine == its
        assert file.tell() == truth.tell()


def test_range_file_over_an_object_that_shrank(storage: Storage, root: str) -> None:
    storage.write(join(root, "a"), b"0123456789")
    file = storage.open(join(root, "a"), 20)
    assert file.read(10) == b"0123456789"
    with pytest.raises(StorageError, match="20 bytes were expected"):
        file.read(5)
    file.seek(5)
    with pytest.raises(StorageError, match="only 5 are there"):
        file.read(10)
