"""One model on one device, encoder or reranker: token ids in, its outputs out; knows no corpus and no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bge_ray.errors import ModelError
from bge_ray.model.run.add_norm import compile_norms
from bge_ray.model.run.batching import longest_rows, settle_budget, token_budget_batches
from bge_ray.model.run.executor import Executor, Loaded
from bge_ray.model.run.fused import fuse_layers
from bge_ray.model.run.last_layer import keep_one_token
from bge_ray.model.run.load import Loading
from bge_ray.model.run.memory import card_of, check_device, check_room
from bge_ray.model.run.packed import ATTENTION, can_pack, register
from bge_ray.model.run.padding import sees_padding
from bge_ray.model.run.prefix import can_share, counted_lengths, shared_tokens
from bge_ray.model.run.prepack import prepack_linears
from bge_ray.model.run.result import Result
from bge_ray.model.run.terms import TermModel, term_counter
from bge_ray.model.spec import family_of, hash_files
from bge_ray.records.ids import IdArray
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import Auto

# Of a model whose configuration does not say it.
USUAL_HIDDEN = 768


@dataclass(frozen=True)
class Place:
    """Where a model runs: a torch device, CPU threads of this process, and whether the folder's code runs."""

    device: str = "cpu"
    threads: int = 1
    trust_remote_code: bool = False


class Model:
    """A loaded model. ``run`` is the verb; the others prepare what it takes."""

    def __init__(self, spec: ModelSpec, folder: Path, place: Place, packed: bool | None = None) -> None:
        """Load the model that ``spec`` names, and refuse any other.

        Args:
            spec: the model as the run was planned with it.
            folder: its files, as `spec.model_folder` returns them.
            place: where it runs.
            packed: run without padding; None where it is known to be right and faster.

        Raises:
            ModelError: the weights here are not those of the spec, are larger than the device, or some would
                stay random; torch sees no device; or the spec has layers fused that cannot be.
        """
        _check_files(spec, folder)
        torch.set_num_threads(place.threads)
        self.spec = spec
        self.device = torch.device(place.device)
        check_device(self.device)
        check_room(spec, folder, self.device)
        dtype = getattr(torch, spec.dtype)
        if packed is None:
            # Remote code has a forward pass of its own, of which nothing is known.
            config = None if place.trust_remote_code else family_of(spec).packing_config(spec, folder)
            packed = config is not None and can_pack(config, self.device, dtype)
        if packed:
            register()

        def load(how: Loading) -> Loaded:
            model, heads = family_of(spec).load(spec.of_states, folder, how)
            return Loaded(model, tuple(heads))

        loaded = load(Loading(dtype, ATTENTION if packed else None, place.trust_remote_code))
        if spec.kernels == "fused":
            fuse_layers(loaded.model)
        needs = {head.needs for head in loaded.heads}
        shares = packed and can_share(loaded.model, needs)
        if packed:
            keep_one_token(loaded.model, needs)
        if self.device.type == "cpu":
            for module in (loaded.model, *loaded.heads):
                prepack_linears(module, dtype)
        self._hidden = int(getattr(loaded.model.config, "hidden_size", USUAL_HIDDEN))
        exact = Loading(torch.float32, trust_remote_code=place.trust_remote_code)
        self._model = loaded.model
        counter = None
        if spec.of_states != spec:
            counter = term_counter(spec, folder, trust_remote_code=place.trust_remote_code)
        self._executor = Executor(
            loaded, lambda: load(exact), device=self.device, packed=packed, shares=shares, counter=counter
        )
        self._equal = not packed and sees_padding(self._executor, spec, self._model.config)

    def settle_budget(self, asked: int | Auto) -> int:
        """Return the token budget of a batch: as asked for, or what suits this model on its device."""
        return settle_budget(asked, card_of(self.device), self._hidden)

    def cut(self, tokens: PackedTokens, budget: int) -> list[IdArray]:
        """Cut n rows into batches of at most ``budget`` tokens, as this model counts."""
        shared = shared_tokens(tokens) if self._executor.shares else 0
        lengths = counted_lengths(tokens.lengths, shared) if shared else tokens.lengths
        packed = self._executor.packed
        return token_budget_batches(lengths, max(1, budget - shared), packed=packed, equal=self._equal)

    def empty_result(self, n_rows: int) -> Result:
        """Return a result of n rows that `run` fills: as many as its tokens have results."""
        return Result(self.spec.outputs, n_rows)

    def warm_up(self, budget: int) -> None:
        """Run a batch of the longest rows for nothing: kernels are compiled and loaded, memory is claimed.

        A model that was not warmed up runs without what would have to be compiled.
        """
        compile_norms(self._model)
        tokens = longest_rows(self.spec.max_length, budget)
        self.run(tokens, self.cut(tokens, budget), self.empty_result(len(tokens)))

    def run(self, tokens: PackedTokens, batches: Sequence[IdArray], result: Result) -> None:
        """Compute the outputs of the rows of the given batches into ``result``.

        A batch that does not fit in memory is halved and tried again; a single row that does not
        fit, that has no token, or whose outputs are not finite even in float32, is named in ``faults``.

        Args:
            tokens: n rows, as a feeder makes them.
            batches: row numbers of each forward pass, as `cut` makes them.
            result: of `empty_result(tokens.n_results)`; rows in no batch are left as they are.

        Raises:
            ModelError: too many rows are finite in float32 alone.
            RuntimeError: whatever the model raises that is not a lack of memory.
        """
        self._executor.run(tokens, batches, result)


def open_model(spec: ModelSpec, folder: Path, place: Place) -> Model | TermModel:
    """Load the model that a spec names, or what counts the tokens of texts where nothing else is made.

    Raises:
        ModelError: see `Model`.
    """
    if not spec.counts_only:
        return Model(spec, folder, place)
    _check_files(spec, folder)
    return TermModel(spec, folder, trust_remote_code=place.trust_remote_code)


def _check_files(spec: ModelSpec, folder: Path) -> None:
    if hash_files(spec, folder) != spec.weights_sha256:
        raise ModelError(
            f"{folder}: its files differ from those the run was planned with; "
            "give every node the same model folder"
        )
