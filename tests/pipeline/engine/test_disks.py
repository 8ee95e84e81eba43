"""An output that another node of the cluster does not see is refused before the work begins."""

import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from bge_ray.errors import SettingsError
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.engine.disks import look, refuse_unseen_by
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.rerank.job import rerank
from bge_ray.settings.sections import parse_settings
from bge_ray.storage.lease import Lease, holder_of
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder
from tests.support.models import make_cross_encoder
from tests.support.runs import REPOSITORY
from tests.support.searches import jsonl, settings_for
from tests.support.vectors import make_dataset

STORAGE = Storage(5)


def test_a_node_sees_a_folder_by_the_lease_of_this_run(tmp_path: Path) -> None:
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    with Lease(STORAGE, ours), Lease(STORAGE, theirs):
        holder = holder_of(STORAGE, ours)
        assert holder is not None
        # The same path on another disk: nothing there, what another run left, a folder that is a file.
        (tmp_path / "file").write_bytes(b"")
        places = [ours, theirs, str(tmp_path / "none"), str(tmp_path / "file")]
        seen = look([(STORAGE, uri, holder) for uri in places], 0.0)
    assert seen == [True, False, False, False]


def test_the_refusal_names_setting_folder_node_and_the_ways_out() -> None:
    folders = [OwnedFolder(STORAGE, f"/{n}", "run", key) for n, key in enumerate(["search.output", "b.c"])]
    refuse_unseen_by("10.0.0.7", folders, [True, True])
    said = r"b\.c /1: node 10\.0\.0\.7 .* does not see .* a folder that all nodes share, or object storage"
    with pytest.raises(SettingsError, match=said) as caught:
        refuse_unseen_by("10.0.0.7", folders, [True, False])
    assert caught.value.exit_code == 2


TWO_DISKS = """
import os
import sys
import ray
from ray.cluster_utils import Cluster
from bge_ray.errors import SettingsError
from bge_ray.pipeline.engine.disks import refuse_unseen
from bge_ray.storage.lease import Leases
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import OwnedFolder

def refuse(*uris):
    folders = [OwnedFolder(Storage(5), uri, "run", "search.output") for uri in uris]
    with Leases(Storage(5), list(uris)):
        try:
            refuse_unseen(folders, lambda: None, late_s=0.0)
        except SettingsError as error:
            return str(error)
    return "seen"

# A home is where the one machine has another folder for each node under one path.
head_home, other_home = sys.argv[1:]
node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_log_monitor": False}
node["object_store_memory"] = 100 << 20
os.environ["HOME"] = other_home
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node)
os.environ["HOME"] = head_home
ray.init(cluster.address)
print(refuse(head_home + "/shared"))
print(refuse(head_home + "/shared", "~/out"))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(150)
def test_a_node_with_a_disk_of_its_own_is_found(tmp_path: Path) -> None:
    homes = [tmp_path / "head", tmp_path / "other"]
    for home in homes:
        home.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", TWO_DISKS, *map(str, homes)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seen, refused = run.stdout.splitlines()[-2:]
    assert seen == "seen"
    assert refused.startswith("search.output ~/out: node 127.0.0.1 of the cluster does not see")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("job", ["embed", "index", "rerank"])
def test_the_memory_of_one_process_is_no_output(tmp_path: Path, tiny_model: Path, job: str) -> None:
    """Each job looks, and has written nothing but who it is."""
    uri = f"memory://{uuid.uuid4().hex}"
    if job == "embed":
        (tmp_path / "a.jsonl").write_bytes(jsonl([{"id": "1", "text": "a passage"}]))
        keys = [f"corpus.uri={tmp_path}", f"model.name={tiny_model}", "resources.num_encoders=1"]
    elif job == "index":
        make_dataset(uri, [300], 16)
        keys = ["index.factory=Flat"]
    else:
        model = make_cross_encoder(tmp_path / "ce", positions=64)
        record = {"query_id": "q", "query": "a", "passages": [{"passage_id": "p", "text": "b"}]}
        (tmp_path / "lists.jsonl").write_bytes(jsonl([record]))
    with pytest.raises(SettingsError, match=r"memory of this process, .* share, or object storage") as caught:
        if job == "embed":
            embed(parse_settings(None, [*keys, f"output.uri={uri}"]))
        elif job == "index":
            build_index(parse_settings(None, [*keys, f"output.uri={uri}"]))
        else:
            candidates = str(tmp_path / "lists.jsonl")
            rerank(settings_for(rerank__model=str(model), rerank__candidates=candidates, rerank__output=uri))
    assert caught.value.exit_code == 2
    folder = join(uri, "index") if job == "index" else uri
    made = re.compile(r"/(done|embeddings|parts|plan|trained)/|/(index\.faiss|manifest\.json|run\.parquet)$")
    assert not [info.uri for info in STORAGE.list_files(folder) if made.search(info.uri)]
