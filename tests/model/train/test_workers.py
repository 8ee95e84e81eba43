"""Two workers under DDP have the gradient of one that has all of their rows."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from bge_ray.model.train import pieces
from bge_ray.model.train.losses import Contrast
from bge_ray.model.train.objective import Embedding
from tests.model.train.test_losses import GROUP, PASSAGES, QUERIES, TEACHER, built, gradients, tokens
from tests.support.models import make_encoder

pytestmark = pytest.mark.long

HALF = len(QUERIES) // 2


def batch(folder: Path, start: int, stop: int) -> list[dict[str, torch.Tensor]]:
    whole = [tokens(folder, QUERIES), tokens(folder, PASSAGES)]
    cuts = (slice(start, stop), slice(start * GROUP, stop * GROUP))
    return [{name: part[cut] for name, part in side.items()} for side, cut in zip(whole, cuts, strict=True)]


def objective(folder: Path, rows: int | None) -> Embedding:
    return Embedding(built(f"model.name={folder}"), Contrast(0.02, "all", "kl"), rows)


def work(rank: int, port: int, folder: Path, rows: int | None, least: int, target: Path) -> None:
    pieces.LEAST_ROWS["cpu"] = least
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    one = objective(folder, rows)
    inner: Any = one.model
    one.model = torch.nn.parallel.DistributedDataParallel(inner)
    start = rank * HALF
    found = gradients(one, batch(folder, start, start + HALF), TEACHER[start : start + HALF])
    torch.save(
        {name.replace("model.module.", "model."): part for name, part in found.items()}, target / f"{rank}.pt"
    )
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "least"), [(None, 99), (2, 99), (None, 2)])
def test_the_gradient_is_that_of_all_rows(tmp_path: Path, rows: int | None, least: int) -> None:
    """At once, cached, and in three pieces of like length."""
    folder = make_encoder(tmp_path / "encoder", pooling="mean")
    truth = gradients(objective(folder, None), batch(folder, 0, len(QUERIES)), TEACHER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, folder, rows, least, tmp_path), nprocs=2)
    assert max(float(part.abs().max()) for part in truth.values()) > 1e-2
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == truth.keys()
        for name, gradient in truth.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
