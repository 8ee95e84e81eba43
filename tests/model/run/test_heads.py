"""A family with outputs of every kind: ragged ones, too, come whole through batches, retries and faults."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PretrainedConfig

import bge_ray.model.spec as table
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.heads import Head, Pooled, Ragged
from bge_ray.model.run.inputs import Inputs
from bge_ray.model.run.load import Loading, load_config, load_encoder
from bge_ray.model.run.result import Result
from bge_ray.model.spec import text_feeder
from bge_ray.records.model import ModelSpec
from bge_ray.records.outputs import Output
from tests.model.conftest import MakeModel, load, resolve, run

TEXTS = ["the quick brown fox", "over the lazy dog", "ray runs actors", "a", "the fox and the dog " * 9]


def token_states(states: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, dim) states of all rows end to end, and (rows,) how many are each row's."""
    if inputs.borders is not None:
        return states[0], inputs.borders.diff()
    if inputs.mask is None:
        return states.flatten(0, 1), torch.full((len(states),), states.shape[1])
    return states[inputs.mask], inputs.mask.sum(1)


class AllStates(Head):
    def forward(self, hidden, inputs: Inputs) -> Ragged:
        return Ragged(*token_states(hidden.last_hidden_state, inputs))


class FirstNumbers(Head):
    """Sparse: the positive ones among the first numbers of a row's tokens, under the token's place."""

    def forward(self, hidden, inputs: Inputs) -> Ragged:
        states, lengths = token_states(hidden.last_hidden_state, inputs)
        rows = states[:, 0].split(lengths.tolist())
        kept = [(~(row <= 0)).nonzero()[:, 0] for row in rows]  # NaN is kept, to be found out
        return Ragged(
            torch.cat([row[k] for row, k in zip(rows, kept, strict=True)]),
            torch.tensor([len(k) for k in kept]),
            torch.cat(kept),
        )


class FirstLayer(Head):
    def forward(self, hidden, inputs: Inputs) -> torch.Tensor:
        states = hidden.hidden_states[1]
        return states[0, inputs.borders[:-1], 3] if inputs.borders is not None else states[:, 0, 3]


@dataclasses.dataclass(frozen=True)
class EveryKind:
    """One file, one line in the table, and its heads: what a family takes."""

    NAME: str = "every_kind"
    ROLE: str = "encoder"

    def feeder(self, spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> TextFeeder:
        return TextFeeder(folder, spec.max_length, trust_remote_code=trust_remote_code)

    def packing_config(self, spec: ModelSpec, folder: Path) -> PretrainedConfig:
        return load_config(folder)

    def load(self, spec: ModelSpec, folder: Path, how: Loading) -> tuple[torch.nn.Module, Sequence[Head]]:
        heads = (
            Pooled(spec.output("embedding"), "cls", normalize=False),
            AllStates(spec.output("multi"), "all_tokens"),
            FirstNumbers(spec.output("sparse"), "all_tokens"),
            FirstLayer(spec.output("layer"), "layers"),
        )
        return load_encoder(folder, how), heads


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FAMILIES", (*table.FAMILIES, EveryKind()))


def spec_of(folder: Path, stored: str = "float32", **changes: object) -> ModelSpec:
    outputs = (
        Output("embedding", "dense", 32, stored),
        Output("multi", "multi", 32, stored),
        Output("sparse", "sparse", 128, stored),
        Output("layer", "scalar", 1, stored),
    )
    return dataclasses.replace(resolve(folder, **changes), family="every_kind", outputs=outputs)


def outputs_of(spec: ModelSpec, *, packed: bool, budget: int = 40) -> Result:
    return run(load(spec, packed=packed), text_feeder(spec).passages(TEXTS), budget)


def alone(folder: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, dim) states of the last layer and of the first, by transformers alone."""
    ids = torch.from_numpy(TextFeeder(folder, 128).passages([text]).input_ids)[None].long()
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(ids, output_hidden_states=True)
    return hidden.last_hidden_state[0].numpy(), hidden.hidden_states[1][0].numpy()


def check_row(
    columns: dict[str, pa.Array], row: int, last: np.ndarray, first: np.ndarray, atol: float
) -> None:
    def close(a: object, b: np.ndarray) -> None:
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=atol, rtol=atol)

    close(columns["embedding"][row].as_py(), last[0])
    stored = np.float32 if columns["layer"].type == pa.float32() else np.float16
    close(np.frombuffer(b"".join(columns["multi"][row].as_py()), stored).reshape(-1, 32), last)
    close(columns["layer"][row].as_py(), first[0, 3])
    sparse = columns["sparse"][row].as_py()
    positive = np.flatnonzero(last[:, 0] > 0)
    assert sparse["indices"] == positive.tolist()
    close(sparse["values"], last[positive, 0])


@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_each_output_equals_that_of_the_row_alone(
    encoder_folder: MakeModel, kind: str, packed: bool, stored: str
) -> None:
    folder = encoder_folder(kind, "cls")
    spec = spec_of(folder, stored)
    result = outputs_of(spec, packed=packed)
    assert result.batches > 1 and not result.faults
    columns = result.columns()
    for output in spec.outputs:
        assert columns[output.name].type == output.field().type
        assert columns[output.name].null_count == 0
        columns[output.name].validate(full=True)
    for row, text in enumerate(TEXTS):
        check_row(columns, row, *alone(folder, text), atol=2e-5 if stored == "float32" else 3e-3)


def poison(source: Path, target: Path, value: float | torch.Tensor) -> Path:
    """Copy a model folder with another embedding of the word lazy."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    token = int(TextFeeder(source, 16).passages(["lazy"]).input_ids[1])
    key = next(k for k in weights if k.endswith("word_embeddings.weight"))
    weights[key][token] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_beyond_float16_is_done_in_float32(
    encoder_folder: MakeModel, tmp_path: Path, packed: bool
) -> None:
    folder = poison(encoder_folder("bert", "cls"), tmp_path / "m", torch.linspace(-1, 1, 32) * 1e6)
    result = outputs_of(spec_of(folder, dtype="float16"), packed=packed)
    assert not result.faults
    columns = result.columns()
    check_row(columns, 1, *alone(folder, TEXTS[1]), atol=2e-5)
    assert [len(v) for v in columns["multi"]] == TextFeeder(folder, 128).passages(TEXTS).lengths.tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_a_fault_is_null_in_every_column_and_in_its_row_only(
    encoder_folder: MakeModel, tmp_path: Path, packed: bool
) -> None:
    folder = poison(encoder_folder("bert", "cls"), tmp_path / "m", float("nan"))
    result = outputs_of(spec_of(folder), packed=packed)
    assert {row: reason for row, (reason, _) in result.faults.items()} == {1: "non_finite"}
    columns = result.columns()
    for column in columns.values():
        assert column.is_null().to_pylist() == [row == 1 for row in range(len(TEXTS))]
        column.validate(full=True)
    for row in (0, 2, 3, 4):
        check_row(columns, row, *alone(encoder_folder("bert", "cls"), TEXTS[row]), atol=2e-5)


def test_a_vector_that_its_stored_dtype_cannot_hold_is_a_fault(
    encoder_folder: MakeModel, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(encoder_folder("bert", "cls"), tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    key = next(k for k in weights if k.endswith("layer.1.output.LayerNorm.bias"))
    weights[key][7] = 70_000.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not outputs_of(spec_of(folder, "float32"), packed=True).faults
    result = outputs_of(spec_of(folder, "float16"), packed=True)
    assert sorted(result.faults) == [0, 1, 2, 3, 4]
    reason, detail = result.faults[0]
    assert reason == "non_finite"
    assert "exceeds 65504" in detail and detail.endswith("the largest float16")
    assert result.columns()["multi"].null_count == len(TEXTS)


def test_rows_in_no_batch_are_empty_and_dense_columns_are_views(encoder_folder: MakeModel) -> None:
    spec = spec_of(encoder_folder("bert", "cls"), "float16")
    model = load(spec)
    result = model.empty_result(len(TEXTS))
    tokens = text_feeder(spec).passages(TEXTS)
    model.run(tokens, [np.array([2, 0])], result)
    columns = result.columns()
    assert columns["multi"][1].as_py() == [] and columns["sparse"][1].as_py() == {"indices": [], "values": []}
    flat = columns["embedding"].values.to_numpy()
    assert np.shares_memory(flat, result.array("embedding")) and flat.dtype == np.float16
    model.run(tokens, [np.array([0])], result)  # a row that is run again has its last values, once
    assert len(result.columns()["multi"][0]) == tokens.lengths[0]


def test_no_rows(encoder_folder: MakeModel) -> None:
    columns = load(spec_of(encoder_folder("bert", "cls"))).empty_result(0).columns()
    assert [len(column) for column in columns.values()] == [0, 0, 0, 0]


def test_vectors_of_another_length_than_the_spec_says_are_refused(encoder_folder: MakeModel) -> None:
    from bge_ray.errors import ModelError

    spec = spec_of(encoder_folder("bert", "cls"))
    outputs = (dataclasses.replace(spec.outputs[0], dim=33), *spec.outputs[1:])
    with pytest.raises(ModelError, match="embedding: its vectors have 32 dimensions, not 33"):
        outputs_of(dataclasses.replace(spec, outputs=outputs), packed=True)
