"""Texts are read as tokenizer.json says, whatever transformers builds; a foreign tokenizer is refused."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from bge_ray.errors import ModelError
from bge_ray.model.feed.pipeline import PROBES
from bge_ray.model.feed.texts import TextFeeder, load_tokenizer
from bge_ray.model.spec import text_feeder
from tests.model.conftest import MakeModel, resolve
from tests.support.models import make_wordpiece

WHERE_THEY_DIFFER = ["tail ", "a\tb", "ray runs actors\nand tasks "]


@pytest.fixture
def rebuilt(encoder_folder: MakeModel, tmp_path: Path) -> Path:
    """An XLM-R whose class transformers 5 builds anew: its NFKC and bare Metaspace are not taken over."""
    folder = Path(shutil.copytree(encoder_folder("xlm-roberta", "cls"), tmp_path / "rebuilt"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "XLMRobertaTokenizer"}))
    return folder


def test_the_file_wins(rebuilt: Path, encoder_folder: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoTokenizer

    raw = Tokenizer.from_file(str(rebuilt / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(rebuilt)
    assert theirs("tail ")["input_ids"] != raw.encode("tail ").ids, "transformers builds it as it is"
    texts = [*WHERE_THEY_DIFFER, *PROBES]
    with caplog.at_level(logging.WARNING):
        feeder = TextFeeder(rebuilt, 64)
    tokens = feeder.passages(texts)
    for row, text in enumerate(texts):
        ids = tokens.input_ids[tokens.offsets[row] : tokens.offsets[row + 1]]
        assert ids.tolist() == raw.encode(text).ids
    assert feeder.note is not None and feeder.note in caplog.text and "probe texts, such as" in feeder.note
    untouched = TextFeeder(encoder_folder("xlm-roberta", "cls"), 64).passages(texts)
    np.testing.assert_array_equal(tokens.input_ids, untouched.input_ids)


def test_what_transformers_says_of_the_tokenizer_goes_by_the_file(rebuilt: Path) -> None:
    tokenizer = load_tokenizer(rebuilt, trust_remote_code=False)
    raw = Tokenizer.from_file(str(rebuilt / "tokenizer.json"))
    assert tokenizer("a\tb ")["input_ids"] == raw.encode("a\tb ").ids
    assert tokenizer.num_special_tokens_to_add() == raw.num_special_tokens_to_add(is_pair=False) == 2


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_nothing_is_said_where_the_two_agree(
    encoder_folder: MakeModel, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with caplog.at_level(logging.WARNING, "bge_ray"):
        TextFeeder(encoder_folder(kind, "cls"), 64)
    assert not caplog.records


def test_a_tokenizer_without_a_first_token_is_refused_for_cls(
    encoder_folder: MakeModel, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(encoder_folder("bert", "cls"), tmp_path / "bare"))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(ModelError, match="pooling cls takes the first token"):
        text_feeder(resolve(folder))
    text_feeder(resolve(folder, pooling="mean"))


def test_a_token_at_the_end_that_the_card_does_not_know_is_refused(
    encoder_folder: MakeModel, tmp_path: Path
) -> None:
    text_feeder(resolve(Path(shutil.copytree(encoder_folder("xlm-roberta", "cls"), tmp_path / "bge-m3"))))
    other = Path(shutil.copytree(encoder_folder("bert", "cls"), tmp_path / "bge-m3-unsupervised"))
    with pytest.raises(ModelError, match=r"ends texts with \['\[SEP\]'\], and its card says '</s>'"):
        text_feeder(resolve(other))


def test_another_models_tokenizer_is_refused(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder_folder("bert", "cls"), tmp_path / "foreign"))
    config = json.loads((folder / "config.json").read_text())
    size = make_wordpiece(folder).backend_tokenizer.get_vocab_size(with_added_tokens=False)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    text_feeder(resolve(folder))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size - 1}))
    with pytest.raises(ModelError, match=rf"tokenizer has {size} tokens and its model {size - 1}"):
        text_feeder(resolve(folder))


def test_a_broken_file_is_refused(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder_folder("bert", "cls"), tmp_path / "broken"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        text_feeder(resolve(folder))
