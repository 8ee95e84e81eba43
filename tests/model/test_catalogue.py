"""The catalogue names every card, what it takes and whether it runs."""

import io
import subprocess
import sys

from rich.console import Console

from bge_ray.model.cards import cards
from bge_ray.model.catalogue import catalogue, print_models


def test_every_card_has_a_row() -> None:
    rows = {row.id: row for row in catalogue()}
    assert list(rows) == list(cards())
    base = rows["BAAI/bge-base-en-v1.5"]
    assert (base.gpu_bytes, base.cpu_bytes, base.runs) == (218_000_000, 436_000_000, "yes")
    assert rows["Alibaba-NLP/gte-base-en-v1.5"].runs == "with trust_remote_code"
    assert rows["BAAI/bge-m3-retromae"].runs.startswith("no: it is a base to train from")
    assert rows["BAAI/bge-m3-retromae"].gpu_bytes is None
    assert rows["BAAI/bge-reranker-base"].outputs == ("score",)


def test_all_of_it_is_printed_at_any_width() -> None:
    for width in (80, 200):
        out = io.StringIO()
        print_models(Console(file=out, width=width))
        printed = out.getvalue()
        assert "weights alone" in printed
        if width == 200:
            assert all(card_id in printed for card_id in cards())
            assert "0.22 GB" in printed and "18.48 GB" in printed


def test_it_takes_no_torch() -> None:
    code = "import sys; from bge_ray.model.catalogue import print_models; print_models(); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
