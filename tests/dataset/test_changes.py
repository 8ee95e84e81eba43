"""A follower that applies what `bge-ray changes` tells has what the data set has, from wherever it begins."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bge_ray.changes import difference_table
from bge_ray.dataset.changes import _without, read_changes, read_difference
from bge_ray.errors import DatasetMismatchError, SettingsError
from bge_ray.storage.objects import Storage
from tests.support.runs import REPOSITORY
from tests.support.vectors import VectorDataset, clustered

STORAGE = Storage(10)


def contents(root: Path, shards: list[str]) -> dict[int, bytes]:
    """Return the vector of every id of some shards."""
    found: dict[int, bytes] = {}
    for path in shards:
        table = pq.read_table(root / path)
        for number, vector in zip(
            table["vector_id"].to_pylist(), table["embedding"].to_pylist(), strict=True
        ):
            assert number not in found
            found[number] = np.asarray(vector, np.float32).tobytes()
    return found


def apply(copy: dict[int, bytes], records: list[dict], root: Path) -> dict[int, bytes]:
    """Do to a copy what a list of records says, as docs/dataset.md does."""
    assert [r["action"] for r in records].count("end") == 1 and records[-1]["action"] == "end"
    for record in records[:-1]:
        inside = {n for n in copy if record["first_id"] <= n < record["stop_id"]}
        assert bool(inside) == (record["action"] != "added"), "nothing is told that the copy knows already"
        copy = {n: vector for n, vector in copy.items() if n not in inside}
        if record["action"] != "removed":
            copy |= contents(root, [record["path"]])
    return copy


def test_a_follower_has_what_the_data_set_has_from_wherever_it_begins(tmp_path: Path) -> None:
    root = tmp_path / "out"
    made = VectorDataset(str(root))
    rng = np.random.default_rng(3)
    states: list[dict[int, bytes]] = [{}]
    alive: dict[int, int] = {}
    next_no = 0
    for step in range(12):
        for _ in range(int(rng.integers(1, 4))):
            if alive and rng.random() < 0.5:
                gone = int(rng.choice(list(alive)))
                made.remove(gone)
                if rng.random() < 0.5:  # the same unit with other bytes: its columns changed
                    made.put(gone, clustered(alive[gone], 32, seed=100 + step), state=f"step {step}")
                else:
                    del alive[gone]
            else:
                alive[next_no] = int(rng.integers(1, 6))
                made.put(next_no, clustered(alive[next_no], 32, seed=next_no))
                next_no += 1
        manifest = made.publish()
        if len(read_changes(STORAGE, str(root))) == len(states):
            states.append(contents(root, [m.embeddings.path for m in manifest.shards]))
    assert len(states) > 8
    told = set()
    for since, known in enumerate(states):
        difference = read_difference(STORAGE, str(root), manifest, since)
        assert difference.number == len(states) - 1
        records = difference_table(difference).to_pylist()
        assert apply(dict(known), records, root) == states[-1]
        told |= {record["action"] for record in records}
    assert told == {"removed", "replaced", "added", "end"}
    with pytest.raises(
        SettingsError, match=rf"--since 99: no change of that .* the last one is {len(states) - 1}"
    ):
        read_difference(STORAGE, str(root), manifest, 99)
    newest = root / f"changes/{len(states) - 1:06d}.json"
    newest.rename(root / "newest")
    for since in (0, 1, len(states) - 2):
        with pytest.raises(DatasetMismatchError, match=r"changes: no file in it leads to manifest\.json"):
            read_difference(STORAGE, str(root), manifest, since)
    (root / "newest").rename(newest)
    (root / "changes/000002.json").unlink()
    with pytest.raises(DatasetMismatchError, match=r"000003\.json: the change before it is gone"):
        read_difference(STORAGE, str(root), manifest, 1)
    # Who began anew goes on behind the gap.
    for since in range(3, len(states)):
        records = difference_table(read_difference(STORAGE, str(root), manifest, since)).to_pylist()
        assert apply(dict(states[since]), records, root) == states[-1]
    for path in (root / "changes").iterdir():
        path.unlink()
    with pytest.raises(DatasetMismatchError, match=r"changes: no file in it leads to manifest\.json"):
        read_difference(STORAGE, str(root), manifest, 0)


def test_ranges_without_others_are_what_sets_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        ranges, others = (
            [
                (int(a), int(b))
                for a, b in np.sort(rng.choice(40, 2 * int(rng.integers(0, 5)), False)).reshape(-1, 2)
            ]
            for _ in range(2)
        )
        left = _without(ranges, others)
        assert left == sorted(left) and all(a < b for a, b in left)
        numbers = [{n for a, b in some for n in range(a, b)} for some in (ranges, others, left)]
        assert numbers[2] == numbers[0] - numbers[1]


@pytest.mark.slow
@pytest.mark.long
def test_the_command_tells_lines_and_writes_parquet_once(tmp_path: Path) -> None:
    root = tmp_path / "out"
    made = VectorDataset(str(root))
    made.put(0, clustered(3, 32, seed=0))
    made.publish()
    made.remove(0)
    made.put(1, clustered(4, 32, seed=1))
    made.publish()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bge_ray", "changes", "--set", f"output.uri={root}", *words]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    told = run("--since", "1")
    assert told.returncode == 0, told.stderr
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert [(line["change"], line["action"]) for line in lines] == [(2, "removed"), (2, "added"), (2, "end")]
    assert lines[1]["rows"] == 4 and (root / lines[1]["path"]).stat().st_size == lines[1]["bytes"]
    assert [json.loads(line)["action"] for line in run("--since", "2").stdout.splitlines()] == ["end"]
    file = tmp_path / "difference.parquet"
    assert run("--output", str(file)).returncode == 0
    written = pq.read_table(io.BytesIO(file.read_bytes())).to_pylist()
    assert [record["action"] for record in written] == ["added", "end"]
    assert run("--output", str(file)).returncode == 0, "the same again"
    again = run("--output", str(file), "--since", "1")
    assert again.returncode == 2 and "is there already" in again.stderr
    assert run("--since", "7").returncode == 2
