"""The command `bge-ray`: its jobs, its answers without Ray, and its ends."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from bge_ray import __version__
from bge_ray.errors import BgeRayError
from bge_ray.evaluate import evaluate, plan_evaluate
from bge_ray.jobs import JOBS
from bge_ray.settings.schema import settings_schema
from bge_ray.settings.sections import known_keys, parse_settings
from bge_ray.settings.shown import to_yaml
from tests.support.runs import REPOSITORY
from tests.support.slow import slow_but

pytestmark = pytest.mark.long

COMMAND = (sys.executable, "-c", "from bge_ray.command import main; main()")
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("module", slow_but(["bge_ray"], ["bge_ray", "bge_ray.command"]))
def test_the_command_as_a_module(module: str) -> None:
    for words, code, said in ((["--version"], 0, __version__), (["embed", "--set", "a.b=1"], 2, "refused")):
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert said in done.stdout + done.stderr


def test_help_version_and_schema_load_neither_ray_nor_torch() -> None:
    script = (
        "import sys, time\n"
        "from bge_ray.command import main\n"
        "sys.argv = ['bge-ray', *sys.argv[1:]]\n"
        "before = time.process_time()\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    code = ended.code\n"
        "heavy = {'ray', 'torch', 'transformers', 'faiss', 'matplotlib'} & set(sys.modules)\n"
        "print(code, sorted(heavy), time.process_time() - before, file=sys.stderr)\n"
    )
    for words in (["--help"], ["--version"], ["schema"], ["search", "--help"], ["embed", "--print-config"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        code, heavy, seconds = re.fullmatch(r"(\d) (\[.*\]) (.*)", done.stderr.splitlines()[-1]).groups()
        assert (code, heavy) == ("0", "[]"), done.stderr
        assert float(seconds) < 2, words  # of this process, however busy the machine is
        assert done.stdout


def test_every_job_is_a_subcommand_and_lists_the_settings_it_reads() -> None:
    listed = run("--help").stdout
    for name in [*(job.name for job in JOBS), "demo", "schema"]:
        assert re.search(rf"^  {name} ", listed, re.MULTILINE), name
    assert run("--version").stdout == f"bge-ray {__version__}\n"
    told = run("rerank", "--help").stdout
    meanings = {key: meaning for key, _, _, meaning in known_keys()}
    for key in ("rerank.candidates", "output.uri", "resources.num_encoders"):
        assert re.search(rf"^ *{re.escape(key)}  +{re.escape(meanings[key])}", told, re.MULTILINE), key
    assert "bench.rows" not in told
    # A key that no job lists would be one that no user can find.
    reads = [read for job in JOBS for read in job.reads]
    assert not [key for key in meanings if key not in reads and key.partition(".")[0] not in reads]


def test_the_file_of_a_job_is_the_same_command() -> None:
    words = ("--print-config", "--set", "search.k=7", "--set", "output.uri=/x")
    by_file = subprocess.run(
        [sys.executable, "jobs/search.py", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert by_file.stdout == run("search", *words).stdout
    assert "k: 7" in by_file.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["nope"],
        ["embed", "--nope"],
        ["embed", "--set", "corpus.ury=x"],
        ["embed", "--config", "/not/there.yaml"],
        ["embed", "--config", "configs/embed.yaml", "--config", "configs/index.yaml"],
        ["ask", "/not/there", " "],
    ],
)
def test_wrong_words_end_with_2_and_a_last_line(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.endswith(f"INFO {words[0]}: refused, nothing was written; exit code 2"), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_the_printed_config_is_the_same_config_again(config: Path) -> None:
    settings = parse_settings(config.read_text(), ["corpus.uri=s3://b/it's: #3", "model.revision=$${X}"])
    again = parse_settings(to_yaml(settings))
    assert again == settings
    assert again.model.revision == "${X}"


def test_a_printed_config_leaves_open_what_nobody_named() -> None:
    """A search takes the model of the data set unless one is named, and a named one is compared with it."""
    for given in ([], ["model.name=/models/x"]):
        settings = parse_settings(None, ["output.uri=/x", *given])
        again = parse_settings(to_yaml(settings))
        assert again == settings
        assert ("name" in again.model.model_fields_set) == bool(given)


def test_the_schema_takes_every_config_and_no_unknown_key() -> None:
    schema = settings_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    assert CONFIGS
    for path in CONFIGS:
        assert list(check.iter_errors(yaml.safe_load(path.read_text()))) == [], path
    for text in ("evaluate: {k: 10, run: a}", "corpus:", "corpus: {keep_columns: url, header: [a, b]}"):
        parse_settings(text)
        assert check.is_valid(yaml.safe_load(text)), text
    for text in ("corpus: {ury: x}", "corpse: {uri: x}", "search: {k: many}", "search: {k: 0}"):
        assert not check.is_valid(yaml.safe_load(text)), text
    assert json.loads(run("schema").stdout) == schema


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:8265", "is the address of a dashboard"),
        ("ray://127.0.0.1:10001", "Ray Client cannot run these jobs"),
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("somewhere", "expected host:port"),
        ("silent", "what answers there is no Ray cluster"),
        ("chatty", "what answers there is no Ray cluster"),
    ],
)
@pytest.mark.parametrize("way", ["RAY_ADDRESS", "resources.address"])
def test_an_address_without_a_cluster_is_refused_in_time(address: str, says: str, way: str) -> None:
    """In this process, because the check itself is what may hang; the code is that of SettingsError."""
    from bge_ray.errors import SettingsError
    from bge_ray.pipeline.engine.cluster import check_address

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        if address == "chatty":
            import threading

            def answer() -> None:
                made, _ = listening.accept()
                made.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                made.close()

            threading.Thread(target=answer, daemon=True).start()
        if address in ("silent", "chatty"):
            address = f"127.0.0.1:{listening.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(SettingsError, match=says) as caught:
            check_address(address, way)
    assert str(caught.value).startswith(f"{way} {address}: ")
    assert time.monotonic() - started < 15


def test_a_server_that_speaks_as_a_head_does_is_let_pass() -> None:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    from bge_ray.pipeline.engine.cluster import check_address

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    check_address(f"127.0.0.1:{port}", "RAY_ADDRESS")
    check_address(f"localhost:{port}", "RAY_ADDRESS")
    server.stop(None).wait()


def test_a_dead_address_ends_the_job_with_2(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "text": "a"}\n')
    words = ["embed", "--set", f"corpus.uri={tmp_path}/corpus.jsonl", "--set", f"output.uri={tmp_path}/out"]
    words += ["--set", f"model.name={tiny_model}"]
    done = run(*words, RAY_ADDRESS="http://127.0.0.1:8265")
    assert done.returncode == 2, done.stderr
    *_, said, last = done.stderr.splitlines()
    assert "ERROR embed: RAY_ADDRESS http://127.0.0.1:8265: is the address of a dashboard" in said
    assert last.endswith("embed: refused, nothing was written; exit code 2")
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_what_evaluate_would_measure_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "run.trec").write_text("q1 Q0 d1 1 0.5 x\n")
    (tmp_path / "qrels").mkdir()
    run_file, missing = f"{tmp_path}/run.trec", f"{tmp_path}/none"
    for runs, qrels, says in [
        (run_file, f"{tmp_path}/qrels", r"evaluate.qrels .*/qrels: is not there, or is an empty folder"),
        (run_file, missing, r"evaluate.qrels .*/none: is not there"),
        (missing, run_file, r"evaluate.run .*/none: is not there"),
    ]:
        settings = parse_settings(None, [f"evaluate.run={runs}", f"evaluate.qrels={qrels}"])
        for ask in (evaluate, plan_evaluate):
            with pytest.raises(BgeRayError, match=says) as caught:
                ask(settings)
            assert caught.value.exit_code == 2
    done = run("evaluate", "--set", f"evaluate.run={run_file}", "--set", f"evaluate.qrels={missing}")
    assert done.returncode == 2, done.stderr
    assert "none: is not there" in done.stderr.splitlines()[-2]
    assert "Traceback" not in done.stderr


def test_without_faiss_a_job_that_needs_it_ends_with_2(tmp_path: Path) -> None:
    (tmp_path / "faiss.py").write_text("raise ImportError('no FAISS here')\n")
    done = run("index", "--set", f"output.uri={tmp_path}", PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert done.returncode == 2, done.stderr
    assert "FAISS cannot be imported: run `pip install 'bge-ray[cpu]'`" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("index: refused, nothing was written; exit code 2")


@pytest.mark.slow
@pytest.mark.ray
def test_a_gpu_that_a_local_cluster_will_never_have_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "text": "a"}\n')
    words = ["embed", "--dry-run", "--set", f"corpus.uri={tmp_path}/corpus.jsonl"]
    words += ["--set", f"output.uri={tmp_path}/out", "--set", f"model.name={tiny_model}"]
    done = run(*words, "--set", "resources.gpus_per_encoder=1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    assert "resources.num_encoders unset: wants 1 GPUs, this machine has 0" in done.stderr.splitlines()[-2]


@pytest.mark.parametrize("answer", ["models", "schema"])
def test_a_reader_who_has_enough_is_no_failure(answer: str) -> None:
    """As head is, which closes its end of the pipe."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    told = subprocess.Popen(
        [*COMMAND, answer], cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    told.stdout.close()
    assert (told.wait(120), told.stderr.read()) == (0, b"")
