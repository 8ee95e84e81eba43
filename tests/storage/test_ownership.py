"""Ownership: no foreign byte is ever replaced or removed, whoever dies when, and ours stay ours."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bge_ray.errors import OutputCollisionError, StorageError
from bge_ray.records.dataset import FileFact
from bge_ray.storage import ownership
from bge_ray.storage.concatenate import Piece
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import JOURNAL, KEPT_CONTENTS, OwnedFolder, digest_object, holds, open_folder
from bge_ray.storage.reports import REPORT_FILES, last_report, retract_report, write_report
from bge_ray.storage.sweep import RETIRED, retire
from tests.storage.doubles import Died, dying, once
from tests.support.slow import slow_but

pytestmark = pytest.mark.long

FOREIGN = b"foreign: a thesis, of which there is no other copy"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def mine(storage: Storage, root: str) -> OwnedFolder:
    return open_folder(storage, root, "run", "search.output")


def journal(storage: Storage, root: str) -> dict:
    return json.loads(storage.read(join(root, JOURNAL)))


def test_opening_writes_nothing_and_a_claim_only_the_journal(storage: Storage, root: str) -> None:
    folder = mine(storage, root)
    assert storage.read_optional(join(root, JOURNAL)) is None
    folder.claim()
    written = storage.info(join(root, JOURNAL))
    folder.claim()
    mine(storage, root).claim()
    assert storage.info(join(root, JOURNAL)) == written
    assert storage.list_files(root) == [], "the journal is hidden from every listing"


def test_a_folder_of_another_job_is_refused(storage: Storage, root: str) -> None:
    open_folder(storage, root, "dataset", "output.uri").claim()
    with pytest.raises(
        OutputCollisionError, match=r"search\.output .*dataset.*choose another search\.output"
    ):
        mine(storage, root)
    assert OutputCollisionError.exit_code == 2


def test_a_folder_that_became_another_jobs_is_not_written_to(storage: Storage, root: str) -> None:
    late = mine(storage, root)
    open_folder(storage, root, "dataset", "output.uri").claim()
    for write in (late.claim, lambda: late.put("report.json", b"{}"), lambda: late.announce("a", 1, "b")):
        with pytest.raises(OutputCollisionError, match="another job"):
            write()
    assert storage.info(join(root, "report.json")) is None
    assert journal(storage, root)["owner"] == "dataset"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"not json", b'{"owner": 1}', b"\xff\xfe"])
def test_a_foreign_file_named_like_the_journal_stays(
    storage: Storage, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / JOURNAL).write_bytes(content)
    with pytest.raises(OutputCollisionError, match="does not say what this project wrote"):
        mine(storage, str(tmp_path))
    assert (tmp_path / JOURNAL).read_bytes() == content


def test_a_journal_of_another_version_is_refused(storage: Storage, root: str) -> None:
    mine(storage, root).claim()
    storage.write(join(root, JOURNAL), json.dumps(journal(storage, root) | {"format_version": 99}).encode())
    with pytest.raises(OutputCollisionError, match="format 99"):
        mine(storage, root)


def test_what_is_ours_is_replaced_verified_and_removed(storage: Storage, root: str) -> None:
    folder = mine(storage, root)
    for data in (b"first", b"second", b"", b"first", b"third"):
        folder.put("deep/run.trec", data)
        assert storage.read(join(root, "deep/run.trec")) == data
        assert holds(
            storage, join(root, "deep/run.trec"), FileFact("deep/run.trec", len(data), sha256(data), 0)
        )
        assert not holds(
            storage, join(root, "deep/run.trec"), FileFact("deep/run.trec", len(data), sha256(b"no"), 0)
        )
        assert not holds(storage, join(root, "deep/run.trec"), FileFact("deep/run.trec", 77, sha256(data), 0))
    assert mine(storage, root).remove(["deep/run.trec", "never-there"]) == []
    assert storage.info(join(root, "deep/run.trec")) is None
    assert not holds(storage, join(root, "deep/run.trec"), FileFact("deep/run.trec", 5, sha256(b"third"), 0))
    folder.put("deep/run.trec", b"again")
    assert storage.read(join(root, "deep/run.trec")) == b"again"


@pytest.mark.parametrize("content", [FOREIGN, b"", b"first"[:4] + b"X"])
def test_a_foreign_file_is_neither_replaced_nor_removed(storage: Storage, root: str, content: bytes) -> None:
    folder = mine(storage, root)
    folder.put("report.json", b"first")
    storage.write(join(root, "report.json"), content)  # edited by its user, at its old size too
    storage.write(join(root, "run.trec"), content)  # never ours
    for name in ("report.json", "run.trec"):
        uri = join(root, name)
        for replace in (
            lambda n: folder.put(n, b"second"),
            lambda n: folder.put_pieces(n, [], sha256(b"")),
            folder.check_replaceable,
        ):
            with pytest.raises(OutputCollisionError) as caught:
                replace(name)
            assert uri in str(caught.value)
            assert "search.output" in str(caught.value)
            assert storage.read(uri) == content
    assert folder.remove(["report.json", "run.trec"]) == ["report.json", "run.trec"]
    assert storage.read(join(root, "report.json")) == content


def test_a_foreign_file_that_has_just_our_bytes_stays_foreign(storage: Storage, root: str) -> None:
    """What we are about to write is announced after the look, so that it cannot make a foreign file ours."""
    storage.write(join(root, "report.json"), b"{}")
    folder = mine(storage, root)
    with pytest.raises(OutputCollisionError):
        folder.put("report.json", b"{}")
    assert folder.remove(["report.json"]) == ["report.json"]


def test_a_folder_in_the_way_is_named(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OutputCollisionError, match=r"report\.json: is in the way"):
        mine(storage, str(tmp_path)).put("report.json", b"{}")


def test_pieces_become_a_file_of_ours(storage: Storage, root: str) -> None:
    contents = [b"one ", b"two ", b"three"]
    pieces = [Piece(join(root, "work", str(i)), len(data)) for i, data in enumerate(contents)]
    for piece, data in zip(pieces, contents, strict=True):
        storage.write(piece.uri, data)
    folder = mine(storage, root)
    for part in (pieces, pieces[:2], pieces):
        whole = b"".join(contents[: len(part)])
        folder.put_pieces("run.trec", part, sha256(whole))
        assert storage.read(join(root, "run.trec")) == whole
    assert folder.remove(["run.trec"]) == []


@pytest.mark.parametrize("there", [None, b"of the run before"])
def test_a_death_between_any_two_requests_leaves_what_is_ours_ours(
    storage: Storage, root: str, there: bytes | None
) -> None:
    """Also: all deaths one after another, none of which got further than the one before."""
    name, uri = "report.json", join(root, "report.json")
    if there is not None:
        mine(storage, root).put(name, there)
    done, at = False, 0
    while not done:
        deadly = dying(at)
        try:
            mine(deadly, root).put(name, b"new")
            done = True
        except Died:
            assert storage.read_optional(uri) in (there, b"new")
            mine(storage, root).check_replaceable(name)
        at += 1
    assert at > 5
    assert storage.read(uri) == b"new"
    assert mine(storage, root).remove([name]) == []
    assert storage.read_optional(uri) is None


def test_a_foreign_file_that_appears_between_any_two_requests_stays(storage: Storage, root: str) -> None:
    for there in (None, b"of the run before"):
        at, reached = 0, True
        while reached:
            name = f"report-{there is None}-{at}.json"
            uri = join(root, name)
            if there is not None:
                mine(storage, root).put(name, there)
            hooked = once(at, lambda uri=uri: storage.write(uri, FOREIGN))
            try:
                mine(hooked, root).put(name, b"new")
            except OutputCollisionError:
                assert storage.read(uri) == FOREIGN
            reached = len(hooked.counted) > at
            if reached:
                assert storage.read(uri) == FOREIGN, f"lost before request {hooked.counted[at]}"
            at += 1
        assert at > 5


def test_a_foreign_file_that_appears_while_ours_is_removed_stays(storage: Storage, root: str) -> None:
    at, reached = 0, True
    while reached:
        name = f"report-{at}.json"
        mine(storage, root).put(name, b"ours")
        uri = join(root, name)
        hooked = once(at, lambda uri=uri: storage.write(uri, FOREIGN))
        mine(hooked, root).remove([name])
        reached = len(hooked.counted) > at
        if reached:
            assert storage.read(join(root, name)) == FOREIGN, f"lost before request {hooked.counted[at]}"
        at += 1
    assert at > 4


def test_a_twin_that_writes_between_any_two_requests_makes_nothing_foreign(
    storage: Storage, root: str
) -> None:
    for there in (None, b"of the run before"):
        at, reached = 0, True
        while reached:
            name = f"report-{there is None}-{at}.json"
            if there is not None:
                mine(storage, root).put(name, there)
            hooked = once(at, lambda name=name: mine(storage, root).put(name, b"twin"))
            mine(hooked, root).put(name, b"mine")
            reached = len(hooked.counted) > at
            assert storage.read(join(root, name)) == b"mine"
            assert mine(storage, root).check_replaceable(name) is not None
            at += 1


def test_the_journal_stays_small_and_never_forgets_what_is_there(storage: Storage, root: str) -> None:
    folder = mine(storage, root)
    folder.put("report.json", b"there")
    for number in range(3 * KEPT_CONTENTS):
        data = b"%d" % number
        folder.announce("report.json", len(data), sha256(data))  # and the process dies
    kept = journal(storage, root)["files"]["report.json"]
    assert len(kept) == KEPT_CONTENTS
    assert folder.check_replaceable("report.json") is not None
    folder.put("report.json", b"newer")
    assert len(journal(storage, root)["files"]["report.json"]) == KEPT_CONTENTS
    assert folder.remove(["report.json"]) == []


@pytest.mark.parametrize("kind", slow_but(["lost", "mute", "cut"], ["503", "lost", "mute", "cut"]))
def test_a_bad_line_makes_nothing_foreign(storage: Storage, bucket: str, faulty, kind: str) -> None:
    proxy = faulty(lambda number, *_: kind if number % 3 == 0 else "")
    folder = mine(storage, bucket)
    folder.claim()
    for data in (b"first", b"second", b"third"):
        folder.put("report.json", data)
        assert storage.read(join(bucket, "report.json")) == data
    assert folder.remove(["report.json"]) == []
    assert storage.info(join(bucket, "report.json")) is None
    assert proxy.faults >= 5


def test_a_digest_is_that_of_all_bytes(storage: Storage, root: str, monkeypatch) -> None:
    monkeypatch.setattr(ownership, "READ_BYTES", 1000)
    for size in (0, 1, 999, 1000, 1001, 12_345):
        data = bytes(range(256)) * (size // 256 + 1)
        storage.write(join(root, "a"), data[:size])
        info = storage.info(join(root, "a"))
        assert info is not None
        assert digest_object(storage, info) == sha256(data[:size])
    storage.write(join(root, "a"), b"shorter")
    with pytest.raises(StorageError, match="became shorter"):
        digest_object(storage, info)


def test_a_large_file_is_proved_in_bounded_memory(storage: Storage, tmp_path: Path) -> None:
    size = 160 << 20
    with (tmp_path / "run.parquet").open("wb") as file:
        file.truncate(size)
    folder = mine(storage, str(tmp_path))
    folder.announce("run.parquet", size, sha256(bytes(size)))
    tracemalloc.start()
    try:
        assert folder.check_replaceable("run.parquet") is not None
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()


def test_a_report_is_written_and_retracted_where_nothing_foreign_is(storage: Storage, root: str) -> None:
    folder = mine(storage, root)
    write_report(folder, b"<html></html>", b"{}")
    assert last_report() == join(root, "report.html")
    assert storage.read(join(root, "report.json")) == b"{}"
    for at in range(40):
        try:
            retract_report(mine(dying(at), root))
            break
        except Died:
            page, facts = (storage.info(join(root, f"report.{e}")) for e in ("html", "json"))
            assert facts is None or page is not None, "what vouches goes first"
    assert not any(storage.info(join(root, name)) for name in REPORT_FILES)
    write_report(folder, b"<html></html>", b"{}")
    storage.write(join(root, "report.html"), FOREIGN)
    with pytest.raises(OutputCollisionError, match=r"report\.html"):
        retract_report(folder)
    with pytest.raises(OutputCollisionError, match=r"report\.html"):
        write_report(folder, b"<html>2</html>", b"{2}")
    assert storage.read(join(root, "report.json")) == b"{}"
    assert storage.read(join(root, "report.html")) == FOREIGN


NAMES = ("report.json", "run.trec", "index/index.json")
SHARDS = tuple(f"embeddings/{i}.parquet" for i in range(4))
CONTENTS = st.binary(max_size=12).map(lambda b: b"ours " + b)
FOREIGN_CONTENTS = st.binary(max_size=12).map(lambda b: b"not ours " + b)
DEATH = st.one_of(st.just(1000), st.integers(0, 14))


class Owners(RuleBasedStateMachine):
    """Jobs that write, remove, retire and die, beside somebody who puts own files anywhere."""

    root: str

    def __init__(self) -> None:
        super().__init__()
        self.storage = Storage(timeout_s=20.0)
        self.foreign: dict[str, bytes] = {}
        self.shards: set[str] = set()
        self.clock = 0

    @initialize(number=st.integers(0, 2**60))
    def start(self, number: int) -> None:
        self.folder = join(self.root, f"{number:x}")
        for info in self.storage.list_files(self.folder):
            self.storage.delete([info.uri])
        self.storage.delete([join(self.folder, JOURNAL), join(self.folder, RETIRED)])

    def attempt(self, act, death: int) -> bool:
        """Do something in a process that may die; tells whether it came to its end."""
        try:
            act(mine(dying(death), self.folder))
        except Died:
            return False
        return True

    @rule(name=st.sampled_from((*NAMES, *SHARDS, "thesis.md")), content=FOREIGN_CONTENTS)
    def somebody_writes(self, name: str, content: bytes) -> None:
        self.storage.write(join(self.folder, name), content)
        self.foreign[name] = content
        self.shards.discard(name)

    @precondition(lambda self: self.foreign)
    @rule(data=st.data())
    def somebody_removes(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.foreign)))
        self.storage.delete([join(self.folder, name)])
        del self.foreign[name]

    @rule(name=st.sampled_from(NAMES), content=CONTENTS, death=DEATH, pieces=st.booleans())
    def job_writes(self, name: str, content: bytes, death: int, pieces: bool) -> None:
        def write(folder: OwnedFolder) -> None:
            if not pieces:
                return folder.put(name, content)
            parts = [Piece(join(self.root, f"piece-{i}"), 1) for i in range(2)]
            for i, part in enumerate(parts):
                self.storage.write(part.uri, content[i : i + 1])
            return folder.put_pieces(name, parts, sha256(content[:2]))

        try:
            done = self.attempt(write, death)
        except OutputCollisionError:
            assert name in self.foreign
            return
        if done:
            assert name not in self.foreign
            assert self.storage.read(join(self.folder, name)) == (content[:2] if pieces else content)

    @rule(names=st.sets(st.sampled_from(NAMES)), death=DEATH)
    def job_removes(self, names: set[str], death: int) -> None:
        left: list[str] = []
        if self.attempt(lambda folder: left.extend(folder.remove(sorted(names))), death):
            assert set(left) == names & set(self.foreign)
            there = {n for n in names if self.storage.info(join(self.folder, n)) is not None}
            assert there == names & set(self.foreign)

    @rule(name=st.sampled_from(SHARDS))
    def job_writes_a_shard(self, name: str) -> None:
        """Under a name that no other writer uses; one that is taken is left to its owner."""
        if name not in self.foreign and self.storage.create(
            join(self.folder, name), b"shard " + name.encode()
        ):
            self.shards.add(name)

    @rule(data=st.data(), death=DEATH, passed=st.integers(0, 100))
    def job_retires(self, data, death: int, passed: int) -> None:
        dead = data.draw(st.sets(st.sampled_from(sorted(self.shards)))) if self.shards else set()
        self.clock += passed
        self.attempt(lambda f: retire(f.storage, self.folder, sorted(dead), 50.0, self.clock), death)
        self.shards = set(self.dead_shards())

    def dead_shards(self) -> list[str]:
        return sorted(n for n in self.shards if self.storage.info(join(self.folder, n)) is not None)

    @invariant()
    def foreign_bytes_never_change(self) -> None:
        for name, content in self.foreign.items():
            assert self.storage.read(join(self.folder, name)) == content

    @invariant()
    def ours_is_never_taken_for_foreign(self) -> None:
        if hasattr(self, "folder"):
            for name in set(NAMES) - set(self.foreign):
                mine(self.storage, self.folder).check_replaceable(name)

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        mine(self.storage, self.folder).remove(NAMES)
        for passed in (0, 50):
            retire(self.storage, self.folder, self.dead_shards(), 50.0, self.clock + passed)
        below = {i.uri.partition(f"{self.folder}/")[2] for i in self.storage.list_files(self.folder)}
        assert below == set(self.foreign), "in the end nothing of ours is left but the journal"
        assert self.storage.read_optional(join(self.folder, RETIRED)) is None
        for uri in [join(self.folder, name) for name in (*below, JOURNAL)]:
            self.storage.delete([uri])


def run_owners(root: str, examples: int) -> None:
    machine = type("OwnersBelow", (Owners,), {"root": root})
    from hypothesis.stateful import run_state_machine_as_test

    checks = list(HealthCheck)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=20, deadline=None, suppress_health_check=checks
        ),
    )


def test_whatever_happens_on_a_local_disk(tmp_path: Path) -> None:
    run_owners(str(tmp_path), 40)


def test_whatever_happens_on_s3(bucket: str) -> None:
    run_owners(bucket, 4)


def test_a_foreign_file_at_a_name_to_come_is_refused_by_its_size(storage: Storage, root: str) -> None:
    folder = mine(storage, root)
    folder.refuse_foreign(["run.parquet", "run.trec"])
    folder.put("run.parquet", b"ours")
    folder.refuse_foreign(["run.parquet", "run.trec"])
    storage.write(join(root, "run.trec"), FOREIGN)
    with pytest.raises(OutputCollisionError, match=r"run\.trec: is in the way"):
        folder.refuse_foreign(["run.parquet", "run.trec"])
