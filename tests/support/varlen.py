"""Flash attention's stand-in on a CPU: what its kernel does, and what it asks for."""

from collections.abc import Sequence

import pytest
import torch
from torch.nn.attention.varlen import _varlen_attn


def attend_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packed attention take the way that it takes on a GPU, with the stand-in at its end."""
    register_reference()
    monkeypatch.setattr("bge_ray.model.run.packed.has_kernel", lambda q: True)


def register_reference() -> None:
    """Make the stand-in the kernel of `varlen_attn` on a CPU."""
    _varlen_attn.register_kernel("cpu")(reference)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] = (-1, -1),
    enable_gqa: bool = False,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend row by row, with the checks of torch's own `flash_api.cpp`."""
    for borders, longest, states in ((cu_seq_q, max_q, q), (cu_seq_k, max_k, k), (cu_seq_k, max_k, v)):
        assert borders.dtype == torch.int32 and borders.is_contiguous()
        assert int(borders[0]) == 0 and int(borders[-1]) == len(states)
        assert int(borders.diff().max()) == longest and int(borders.diff().min()) > 0
        assert states.ndim == 3 and states.stride(-1) == 1
        assert states.shape[-1] % 8 == 0 and states.shape[-1] <= 256
        assert all(stride * states.element_size() % 16 == 0 for stride in states.stride()[:-1])
    assert len(cu_seq_q) == len(cu_seq_k)
    assert q.shape[1] == k.shape[1] or (enable_gqa and q.shape[1] % k.shape[1] == 0)
    left, right = window_size
    out = torch.empty_like(q)
    for row in range(len(cu_seq_k) - 1):
        queries = slice(int(cu_seq_q[row]), int(cu_seq_q[row + 1]))
        keys = slice(int(cu_seq_k[row]), int(cu_seq_k[row + 1]))
        k_row, v_row = (x[keys].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[queries], k_row) * (scale or q.shape[-1] ** -0.5)
        n_q, n_k = scores.shape[1:]
        ahead = torch.arange(n_q)[:, None] + n_k - n_q - torch.arange(n_k)  # aligned at the end
        hidden = (ahead > left) & (left >= 0) | (ahead < -right) & (right >= 0) | (ahead < 0) & is_causal
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        out[queries] = torch.einsum("hqk,khd->qhd", weights, v_row)
    return out, torch.empty(0), torch.empty(0, dtype=torch.uint64)
