"""The rights of infra/policy are enough and needed: a server with identities that have them, or lack one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.corpora import docstrings, mixed_objects
from tests.support.runs import REPOSITORY, JobProcess
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# SeaweedFS's words for the statements of aws-s3.json; Write covers delete and multipart uploads.
CORPUS = ["List:corpus", "Read:corpus"]
OUTPUT = ["List:out", "Read:out", "Write:out"]
IDENTITIES = {
    "enough": CORPUS + OUTPUT,
    "no-corpus": ["List:corpus", *OUTPUT],
    "no-output": [*CORPUS, "List:out", "Read:out"],
}
RECORDS = 200


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    folder = tmp_path_factory.mktemp("guarded")
    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, key, secret, actions in [
            ("owner", ACCESS_KEY, SECRET_KEY, everything),
            *((name, name, f"secret-of-{name}", actions) for name, actions in IDENTITIES.items()),
        ]
    ]
    (folder / "identities.json").write_text(json.dumps({"identities": identities}))
    server = S3Server(folder / "data", f"-s3.config={folder / 'identities.json'}")
    server.start()
    files = server.filesystem()
    for name, data in mixed_objects(docstrings(RECORDS)).items():
        files.pipe_file(f"corpus/corpus/{name}", data)
    yield server
    server.kill()


def embed_as(name: str, server: S3Server, model: Path, log: Path) -> JobProcess:
    keys = {
        "corpus.uri": "s3://corpus/corpus",
        "output.uri": f"s3://out/embeddings-{name}",
        "output.storage_timeout_s": 20,
        "model.name": model,
        "resources.num_encoders": 2,
    }
    own = {"AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": f"secret-of-{name}"}
    return JobProcess(log, keys, environment=server.environment | own)


@pytest.mark.timeout(600)
def test_these_rights_are_enough(guarded: S3Server, tiny_model: Path, tmp_path: Path) -> None:
    run = embed_as("enough", guarded, tiny_model, tmp_path / "log")
    assert run.wait() == 0, run.log()
    manifest = json.loads(guarded.filesystem().cat_file("out/embeddings-enough/manifest.json"))
    assert sum(marker["unit"]["n_rows"] for marker in manifest["shards"]) == RECORDS


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "place"), [("no-corpus", "s3://corpus/corpus/"), ("no-output", "s3://out/embeddings-no-output/")]
)
def test_a_missing_right_is_told_with_operation_and_object(
    guarded: S3Server, tiny_model: Path, tmp_path: Path, name: str, place: str
) -> None:
    run = embed_as(name, guarded, tiny_model, tmp_path / "log")
    assert run.wait() in (1, 2), run.log()
    verb = {"no-corpus": "read", "no-output": "create"}[name]
    assert "ERROR embed: " in run.log()
    assert f"cannot {verb} {place}" in run.log()
    assert "check the credentials in the environment and the bucket policy" in run.log()
    assert "Traceback" not in run.log()
    assert "secret-of" not in run.log()


def test_the_policy_asks_for_nothing_wide() -> None:
    policy = json.loads((REPOSITORY / "infra/policy/aws-s3.json").read_text())
    for statement in policy["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        assert not [action for action in actions if "*" in action]
        listing = all(action.startswith("s3:ListBucket") for action in actions)
        places = [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]
        # What lists is held to prefixes by a condition, what touches objects by the resource itself.
        assert ("Condition" in statement) == listing
        assert all(("/" in place.partition(":::")[2]) != listing for place in places)
    corpus = [s for s in policy["Statement"] if "CORPUS" in json.dumps(s)]
    assert not [s for s in corpus if "Put" in json.dumps(s) or "Delete" in json.dumps(s)]
