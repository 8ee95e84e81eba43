"""Runs batches of rows through one model on one device, whatever the batches do to it.

Encoder and reranker share this: a batch that does not fit in memory is halved, a row whose output
is not finite is tried again in float32, a row that cannot be done is named. What a forward pass
computes is a function given by its owner.
"""

import collections
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from bge_ray.model.feed.rows import Rows
from bge_ray.model.run.inputs import Inputs, packed_inputs, padded_inputs
from bge_ray.model.run.memory import is_out_of_memory
from bge_ray.records.ids import FloatArray, IdArray

Compute: TypeAlias = Callable[[torch.nn.Module, Inputs], torch.Tensor]

# Batches queued on a CUDA device before the oldest is waited for: while one runs, the next is prepared.
QUEUED_BATCHES = 2


@dataclass
class Computed:
    """One output a row, and why some rows have none.

    ``values`` is (n, width) float32; a row named in ``faults`` (row to reason and detail) is zero.
    ``padded_tokens`` counts what was computed, padding included; ``busy_s`` the time it took; ``splits``
    the batches that did not fit in memory and were halved.
    """

    values: FloatArray
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)
    batches: int = 0
    padded_tokens: int = 0
    busy_s: float = 0.0
    splits: int = 0


@dataclass(frozen=True)
class _Launched:
    """A forward pass whose output is on its way: (rows, width) float32 in host memory once ``ready``."""

    rows: IdArray
    output: torch.Tensor
    ready: torch.cuda.Event | None


class Executor:
    """One model on one device; ``run`` is the only verb."""

    def __init__(
        self,
        model: torch.nn.Module,
        compute: Compute,
        load_exact: Callable[[], torch.nn.Module],
        *,
        device: torch.device,
        packed: bool,
    ) -> None:
        """Take a loaded model.

        Args:
            model: moved to the device here.
            compute: (model, inputs) to (rows, width) outputs on the device.
            load_exact: loads the same model in float32 and for padded batches; called once, if ever.
            device: where the model runs.
            packed: whether the model's attention takes packed batches.
        """
        self.device = device
        self.packed = packed
        self._model = model.to(device)
        self._compute = compute
        self._load_exact = load_exact
        self._exact: torch.nn.Module | None = None
        self._is_float32 = next(model.parameters()).dtype == torch.float32

    def run(self, source: Rows, batches: Sequence[IdArray], result: Computed) -> None:
        """Compute the rows of the given batches into ``result``.

        Args:
            source: n rows.
            batches: row numbers of each forward pass, as `token_budget_batches` makes them.
            result: of n rows; rows in no batch are left as they are.

        Raises:
            RuntimeError: whatever the model raises that is not a lack of memory.
        """
        started = time.perf_counter()
        queue: collections.deque[_Launched] = collections.deque()
        depth = QUEUED_BATCHES if self.device.type == "cuda" else 1
        waiting = collections.deque(batches)
        while waiting or queue:
            if queue and (len(queue) >= depth or not waiting):
                self._collect(source, queue.popleft(), result)
                continue
            rows = waiting.popleft()
            launched = self._try_launch(source, rows)
            if launched is not None:
                queue.append(launched)
                result.batches += 1
                result.padded_tokens += self._computed_tokens(source, rows)
            elif queue:  # wait for what is under way, whose memory is then free, and try again
                waiting.appendleft(rows)
                while queue:
                    self._collect(source, queue.popleft(), result)
            elif len(rows) > 1:
                waiting.extendleft([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
                result.splits += 1
            else:
                self._fault_memory(source, int(rows[0]), result)
        result.busy_s += time.perf_counter() - started

    def _try_launch(self, source: Rows, rows: IdArray) -> _Launched | None:
        """Start a forward pass; None if it does not fit in memory."""
        launched = _none_if_out_of_memory(lambda: self._launch(self._model, source, rows, packed=self.packed))
        if launched is None and self.device.type == "cuda":
            torch.cuda.empty_cache()
        return launched

    @torch.inference_mode()
    def _launch(self, model: torch.nn.Module, source: Rows, rows: IdArray, *, packed: bool) -> _Launched:
        make = packed_inputs if packed else padded_inputs
        inputs = make(source, rows, model.config, self.device)
        output = self._compute(model, inputs).float()
        if self.device.type != "cuda":
            return _Launched(rows, output.cpu(), None)
        host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        host.copy_(output, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return _Launched(rows, host, ready)

    def _collect(self, source: Rows, launched: _Launched, result: Computed) -> None:
        if launched.ready is not None:
            launched.ready.synchronize()
        values = launched.output.numpy()
        finite = np.isfinite(values).all(axis=1)
        result.values[launched.rows[finite]] = values[finite]
        for row in launched.rows[~finite]:
            self._retry_in_float32(source, int(row), result)

    def _retry_in_float32(self, source: Rows, row: int, result: Computed) -> None:
        if not self._is_float32:
            launched = _none_if_out_of_memory(lambda: self._launch_exact(source, row))
            if launched is None:
                self._fault_memory(source, row, result)
                return
            if launched.ready is not None:
                launched.ready.synchronize()
            if bool(torch.isfinite(launched.output).all()):
                result.values[row] = launched.output[0].numpy()
                return
        result.faults[row] = ("non_finite", "the model's output holds NaN or infinity, also in float32")

    def _launch_exact(self, source: Rows, row: int) -> _Launched:
        if self._exact is None:
            # From the files: a weight beyond float16's range is infinite in the model at hand.
            self._exact = self._load_exact().to(self.device)
        return self._launch(self._exact, source, np.asarray([row], dtype=np.int64), packed=False)

    def _fault_memory(self, source: Rows, row: int, result: Computed) -> None:
        n_tokens = int(source.lengths(np.asarray([row]))[0])
        result.faults[row] = (
            "out_of_memory",
            f"{n_tokens} tokens alone do not fit in the memory of {self.device}",
        )

    def _computed_tokens(self, source: Rows, rows: IdArray) -> int:
        lengths = source.lengths(rows)
        return int(lengths.sum()) if self.packed else len(rows) * int(lengths.max())


def _none_if_out_of_memory(launch: Callable[[], _Launched]) -> _Launched | None:
    try:
        return launch()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Here and not in the handler: the traceback holds the batch's tensors.
    return None
