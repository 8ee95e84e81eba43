"""ONNX Runtime and OpenVINO as contestants on a CPU: weights, tokens and rule of batches are our loop's.

Neither knows rows laid end to end: batches are padded, of as many tokens with their padding as ours are
without. The back ends that sentence-transformers has for both need the package optimum, which is not to be
had beside transformers 5; so the model is exported here, with its pooling, by what torch and OpenVINO bring.
"""

import functools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, PretrainedConfig

from bge_ray.bench.task import NotHereError, Result, Task, side_by_side, texts_of
from bge_ray.model.run.batching import settle_budget, token_budget_batches
from bge_ray.model.run.inputs import padded_inputs
from bge_ray.model.run.load import load_config
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings

# Of the exported graph: of its ids and its mask, (rows, width) int64 each, and the (rows, dim) vectors.
INPUTS, OUTPUT = ["input_ids", "attention_mask"], "vectors"
# What torch writes, and ONNX Runtime reads; every operator of these models is in it.
OPSET = 17
OF_OPENVINO = {"float32": "f32", "bfloat16": "bf16"}
CPU = torch.device("cpu")

# Padded ids and their mask in, (rows, dim) float32 vectors out.
Forward: TypeAlias = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], FloatArray]


class PooledModel(torch.nn.Module):
    """A model with its pooling: (rows, width) ids and mask in, (rows, dim) vectors of unit norm out."""

    def __init__(self, spec: ModelSpec) -> None:
        """Load it in float32, with the attention that exporters know.

        Raises:
            NotHereError: its pooling is neither of the first token nor the mean.
        """
        super().__init__()
        if spec.pooling not in ("cls", "mean"):
            raise NotHereError(f"pooling {spec.pooling} is not exported")
        self._mean = spec.pooling == "mean"
        folder = model_folder(spec)
        self._model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the vectors."""
        states = self._model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self._mean:
            kept = attention_mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * kept).sum(1) / kept.sum(1)
        else:
            pooled = states[:, 0]
        return torch.nn.functional.normalize(pooled, dim=-1)


def onnx_runtime(task: Task) -> Result:
    """ONNX Runtime with all of its optimisations, as many processes of one thread as the job has encoders.

    Raises:
        NotHereError: not on a CPU, not in float32, or a package is missing.
    """
    if task.dtype != "float32":
        raise NotHereError(f"ONNX Runtime has no {task.dtype} on a CPU")
    return _exported(task, "onnx")


def openvino(task: Task) -> Result:
    """OpenVINO, as many processes of one thread as the job has encoders.

    Raises:
        NotHereError: not on a CPU, in float16, or the package is missing.
    """
    if task.dtype not in OF_OPENVINO:
        raise NotHereError(f"OpenVINO has no {task.dtype} on a CPU")
    return _exported(task, "openvino")


Runtime: TypeAlias = Literal["onnx", "openvino"]


def _exported(task: Task, runtime: Runtime) -> Result:
    if task.device != "cpu":
        raise NotHereError("measured on a CPU alone")
    spec = _spec(task)
    texts = texts_of(task)
    with tempfile.TemporaryDirectory(prefix="bge-ray-bench-") as folder:
        file = Path(folder) / {"onnx": "model.onnx", "openvino": "model.xml"}[runtime]
        try:
            EXPORTS[runtime](PooledModel(spec), file)
        except ImportError as error:
            raise NotHereError(f"needs the packages of the extra bench ({error})") from error
        prepare = functools.partial(_prepare, runtime, file)
        return Result(side_by_side(prepare, task, texts), len(texts))


def _spec(task: Task) -> ModelSpec:
    settings = ModelSettings(name=task.model, dtype=task.dtype, max_length=task.max_length)
    return resolve_encoder(settings, on_gpu=False)


def _prepare(runtime: Runtime, file: Path, task: Task, texts: list[str]) -> Callable[[], None]:
    """Load a file and tokenise texts; returns the work, which has been begun once."""
    spec = _spec(task)
    feeder, config = text_feeder(spec), load_config(model_folder(spec))
    forward = LOADERS[runtime](file, task.dtype)
    budget = settle_budget(task.token_budget, None, spec.dim)
    units = [feeder.passages(texts[i : i + task.unit_rows]) for i in range(0, len(texts), task.unit_rows)]

    def work(limit: int | None = None) -> None:
        for tokens in units:
            encode_padded(forward, config, tokens, token_budget_batches(tokens.lengths, budget)[:limit])

    work(limit=1)
    return work


def encode_padded(
    forward: Forward, config: PretrainedConfig, tokens: PackedTokens, batches: Sequence[IdArray]
) -> FloatArray:
    """Return the (n, dim) float32 vectors of n rows; those of rows in no batch are zero.

    Args:
        forward: the model, of one batch.
        config: of it.
        tokens: of the rows.
        batches: row numbers of each batch.
    """
    vectors = np.zeros((len(tokens), config.hidden_size), np.float32)
    for rows in batches:
        inputs = padded_inputs(tokens, rows, config, CPU)
        ids = inputs.arguments["input_ids"].numpy()
        mask = np.ones_like(ids) if inputs.mask is None else inputs.mask.numpy().astype(np.int64)
        vectors[rows] = forward(ids, mask)
    return vectors


def _example() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two rows of which one is padded: what is traced must not take either for the rule."""
    ids = torch.arange(10, 24).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


def export_onnx(model: torch.nn.Module, file: Path) -> None:
    """Write a model as ONNX.

    Raises:
        ImportError: the package onnx or onnxruntime is missing.
    """
    import onnxruntime  # noqa: F401 - missed before the export, which takes a while

    free = {0: "rows", 1: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing takes for constant; the test has other shapes
        # The older exporter: the newer one takes a minute for the same graph, and a package more.
        torch.onnx.export(
            model,
            _example(),
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=[OUTPUT],
            dynamic_axes={INPUTS[0]: free, INPUTS[1]: free, OUTPUT: {0: "rows"}},
        )


def load_onnx(file: Path, _: str) -> Forward:
    """Load a file for one thread, in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def forward(ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> FloatArray:
        (vectors,) = session.run([OUTPUT], dict(zip(INPUTS, (ids, mask), strict=True)))
        return np.asarray(vectors)

    return forward


def export_openvino(model: torch.nn.Module, file: Path) -> None:
    """Write a model as OpenVINO's.

    Raises:
        ImportError: the package is missing.
    """
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `export_onnx`
        made = openvino.convert_model(model, example_input=_example())
    openvino.save_model(made, str(file), compress_to_fp16=False)


def load_openvino(file: Path, dtype: str) -> Forward:
    """Load a file for one thread, to be computed in float32 or bfloat16."""
    import openvino

    # Pinned, the threads of all processes would share one core: each process begins with the first.
    asked = {
        "INFERENCE_PRECISION_HINT": OF_OPENVINO[dtype],
        "INFERENCE_NUM_THREADS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    compiled: Any = openvino.Core().compile_model(str(file), "CPU", asked)

    def forward(ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> FloatArray:
        return np.asarray(compiled((ids, mask))[0])

    return forward


EXPORTS: dict[Runtime, Callable[[torch.nn.Module, Path], None]] = {
    "onnx": export_onnx,
    "openvino": export_openvino,
}
LOADERS: dict[Runtime, Callable[[Path, str], Forward]] = {"onnx": load_onnx, "openvino": load_openvino}
