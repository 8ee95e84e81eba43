"""Runs batches of rows through one model on one device, whatever the batches do to it.

A batch that does not fit in memory is halved, a row of which an output is not finite is tried again in
float32, a row that cannot be done is named, a model of which many rows need float32 is refused. What is made
of the states is the heads' business.
"""

import collections
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bge_ray.errors import ModelError
from bge_ray.model.heads import Head, Ragged
from bge_ray.model.run.inputs import packed_inputs, padded_inputs
from bge_ray.model.run.memory import is_out_of_memory
from bge_ray.model.run.packed import takes_ready_mask
from bge_ray.model.run.prefix import shared_tokens
from bge_ray.model.run.result import Block, Result
from bge_ray.model.run.terms import TermCounter
from bge_ray.records.ids import IdArray
from bge_ray.records.tokens import PackedTokens

# Batches queued on a CUDA device before the oldest is waited for: while one runs, the next is prepared.
QUEUED_BATCHES = 2
# Beyond this share of the rows, and beyond this number, half precision is not for the model: each such row
# costs a forward pass of its own.
MOST_OVERFLOWING = 0.01
LEAST_OVERFLOWING = 10


@dataclass(frozen=True)
class Loaded:
    """A model and its heads, in one dtype."""

    model: torch.nn.Module
    heads: tuple[Head, ...]

    def to(self, device: torch.device) -> "Loaded":
        """Move the model and the weights of its heads to a device."""
        return Loaded(self.model.to(device), tuple(head.to(device) for head in self.heads))


@dataclass(frozen=True)
class _Launched:
    """A forward pass whose outputs are on their way: in host memory once ``ready``."""

    rows: IdArray
    outputs: list["_Sent"]
    ready: torch.cuda.Event | None

    def blocks(self) -> list[Block]:
        """Wait for the outputs."""
        if self.ready is not None:
            self.ready.synchronize()
        return [sent.block() for sent in self.outputs]


@dataclass(frozen=True)
class _Sent:
    """One output in host memory, or on its way there: the tensors of a `Block`."""

    values: torch.Tensor
    largest: torch.Tensor
    lengths: torch.Tensor | None = None
    indices: torch.Tensor | None = None

    def block(self) -> Block:
        values, largest = self.values.numpy(), self.largest.numpy()
        if self.lengths is None:
            return Block(values, largest)
        lengths = self.lengths.numpy()
        total = int(lengths.sum())  # what lies behind that was never meant
        indices = None if self.indices is None else self.indices.numpy()[:total]
        return Block(values[:total], largest, lengths, indices)


class Executor:
    """One model on one device; ``run`` is the only verb."""

    def __init__(
        self,
        loaded: Loaded,
        load_exact: Callable[[], Loaded],
        *,
        device: torch.device,
        packed: bool,
        shares: bool = False,
        counter: TermCounter | None = None,
    ) -> None:
        """Take a loaded model.

        Args:
            loaded: moved to the device here.
            load_exact: loads the same in float32 and for padded batches; called once, if ever.
            device: where the model runs.
            packed: whether the model's attention takes packed batches.
            shares: whether what all rows of such a batch begin with is computed once.
            counter: of the tokens of a row, whose output is the last; None where they are not counted.
        """
        self.device = device
        self.packed, self.shares = packed, shares
        self._loaded = loaded.to(device)
        self._load_exact = load_exact
        self._counter = counter
        self._exact: Loaded | None = None
        self._dtype = next(loaded.model.parameters()).dtype
        self._rows = self._overflowed = 0
        self._known = _known_tokens(loaded.model)

    def run(self, source: PackedTokens, batches: Sequence[IdArray], result: Result) -> None:
        """Compute the rows of the given batches into ``result``.

        Args:
            source: n rows.
            batches: row numbers of each forward pass, as `token_budget_batches` makes them.
            result: of the results of all rows; those of rows in no batch are left as they are.

        Raises:
            ModelError: more than a hundredth of all rows so far are finite in float32 alone.
            RuntimeError: whatever the model raises that is not a lack of memory.
        """
        started = time.perf_counter()
        unknown = self._unknown_tokens(source)
        batches = [self._able(source, rows, unknown, result) for rows in batches]
        self._rows += sum(len(rows) for rows in batches)
        queue: collections.deque[_Launched] = collections.deque()
        depth = QUEUED_BATCHES if self.device.type == "cuda" else 1
        waiting = collections.deque(rows for rows in batches if len(rows))
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

    def _unknown_tokens(self, source: PackedTokens) -> dict[int, int]:
        """Return the rows with a token that the model does not know, and which it is."""
        if self._known is None or source.input_ids.max(initial=0) < self._known:
            return {}
        places = np.flatnonzero(source.input_ids >= self._known)
        rows = np.searchsorted(source.offsets, places, side="right") - 1
        return dict(zip(rows.tolist(), source.input_ids[places].tolist(), strict=True))

    def _able(self, source: PackedTokens, rows: IdArray, unknown: dict[int, int], result: Result) -> IdArray:
        """Leave out rows without a token, of which there is no state, and those with an unknown one."""
        empty = source.lengths_of(rows) == 0
        results = source.results_of(rows)
        for number in results[source.lengths_of_results(results) == 0].tolist():
            result.faults[number] = ("no_tokens", "the model's tokenizer makes no token of it")
        for row in unknown.keys() & set(rows.tolist()):
            detail = (
                f"its tokenizer makes token {unknown[row]} of it, and the model has {self._known} from 0 on"
            )
            of_row = source.results_of(np.asarray([row], dtype=np.int64))
            result.faults |= dict.fromkeys(of_row.tolist(), ("unknown_token", detail))
        return np.asarray(rows[~empty & ~np.isin(rows, list(unknown))])

    def _try_launch(self, source: PackedTokens, rows: IdArray) -> _Launched | None:
        """Start a forward pass; None if it does not fit in memory."""
        launched = _none_if_out_of_memory(
            lambda: self._launch(self._loaded, source, rows, packed=self.packed)
        )
        if launched is None and self.device.type == "cuda":
            torch.cuda.empty_cache()
        return launched

    @torch.inference_mode()
    def _launch(self, loaded: Loaded, source: PackedTokens, rows: IdArray, *, packed: bool) -> _Launched:
        config: Any = loaded.model.config
        if packed:
            shared = shared_tokens(source, rows) if self.shares else 0
            inputs = packed_inputs(source, rows, config, self.device, shared)
        else:
            ready = takes_ready_mask(loaded.model)
            inputs = padded_inputs(source, rows, config, self.device, ready_mask=ready)
        if any(head.needs == "layers" for head in loaded.heads):
            inputs.arguments["output_hidden_states"] = True
        hidden = loaded.model(**inputs.arguments)
        outputs = [_send(_checked(head, head(hidden, inputs)), head.output.dtype) for head in loaded.heads]
        if self.device.type != "cuda":
            return _Launched(rows, outputs, None)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return _Launched(rows, outputs, done)

    def _collect(self, source: PackedTokens, launched: _Launched, result: Result) -> None:
        infinite = self._put(source, launched, result)
        for row in source.rows_of(infinite).tolist():
            own = source.results_of(np.asarray([row], dtype=np.int64))
            self._retry_in_float32(source, row, own[np.isin(own, infinite)], result)

    def _put(self, source: PackedTokens, launched: _Launched, result: Result) -> IdArray:
        counts = [] if self._counter is None else [self._counter.block(source, launched.rows)]
        return result.put(source.results_of(launched.rows), [*launched.blocks(), *counts])

    def _retry_in_float32(self, source: PackedTokens, row: int, infinite: IdArray, result: Result) -> None:
        if self._dtype != torch.float32:
            launched = _none_if_out_of_memory(lambda: self._launch_exact(source, row))
            if launched is None:
                self._fault_memory(source, row, result)
                return
            infinite = self._put(source, launched, result)
            if not len(infinite):
                self._count_overflow()
                return
        detail = "the model's output holds NaN or infinity, also in float32"
        result.faults |= dict.fromkeys(infinite.tolist(), ("non_finite", detail))

    def _count_overflow(self) -> None:
        self._overflowed += 1
        if self._overflowed <= max(LEAST_OVERFLOWING, MOST_OVERFLOWING * self._rows):
            return
        name = str(self._dtype).removeprefix("torch.")
        raise ModelError(
            f"of {self._rows} rows at least {self._overflowed}, more than {MOST_OVERFLOWING:.0%}, are finite "
            f"in float32 and not in {name}: the model's numbers go beyond what {name} holds. Compute it in "
            "bfloat16 (model.dtype, or rerank.dtype of a reranker), or in float32"
        )

    def _launch_exact(self, source: PackedTokens, row: int) -> _Launched:
        if self._exact is None:
            # From the files: a weight beyond float16's range is infinite in the model at hand.
            self._exact = self._load_exact().to(self.device)
        return self._launch(self._exact, source, np.asarray([row], dtype=np.int64), packed=False)

    def _fault_memory(self, source: PackedTokens, row: int, result: Result) -> None:
        rows = np.asarray([row], dtype=np.int64)
        detail = f"{int(source.lengths_of(rows)[0])} tokens alone do not fit in the memory of {self.device}"
        result.faults |= dict.fromkeys(source.results_of(rows).tolist(), ("out_of_memory", detail))

    def _computed_tokens(self, source: PackedTokens, rows: IdArray) -> int:
        lengths = source.lengths_of(rows)
        return int(lengths.sum()) if self.packed else len(rows) * int(lengths.max())


def _known_tokens(model: torch.nn.Module) -> int | None:
    """Return how many tokens a model has vectors of; None if it makes them in another way than by a table."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        table = None if find is None else find()
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, torch.nn.Embedding) else None


def _checked(head: Head, output: torch.Tensor | Ragged) -> torch.Tensor | Ragged:
    """Refuse vectors of another length than the spec says."""
    values = output.values if isinstance(output, Ragged) else output
    if head.output.kind in ("dense", "multi") and values.shape[-1] != head.output.dim:
        raise ModelError(
            f"{head.output.name}: its vectors have {values.shape[-1]} dimensions, not {head.output.dim}"
        )
    return output


def _send(output: torch.Tensor | Ragged, dtype: str) -> _Sent:
    """Send an output to host memory in its stored dtype; from a CUDA device it may not be there yet."""
    stored = getattr(torch, dtype)
    if not isinstance(output, Ragged):
        values = output.float()
        largest = values.abs() if values.ndim == 1 else values.abs().amax(-1)
        return _Sent(_copied(values.to(stored)), _copied(largest))
    values = output.values.float()
    of_each = values.abs() if values.ndim == 1 else values.abs().amax(-1)
    ends = output.lengths.cumsum(0)
    rows = torch.searchsorted(ends, torch.arange(len(values), device=values.device), right=True)
    # One more than there are rows, for what lies behind the last.
    largest = values.new_zeros(len(ends) + 1).scatter_reduce(0, rows, of_each, "amax")[:-1]
    indices = None if output.indices is None else _copied(output.indices.int())
    return _Sent(_copied(values.to(stored)), _copied(largest), _copied(output.lengths.long()), indices)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def _none_if_out_of_memory(launch: Callable[[], _Launched]) -> _Launched | None:
    try:
        return launch()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Here and not in the handler: the traceback holds the batch's tensors.
    return None
