"""Whether the device's vectors are right: packed half precision against padded float32; what must not happen.

Each check notes its worst figure and the most that it may be; one that breaks down notes the error.
"""

import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from bge_ray.bench.device.plan import Note, Plan
from bge_ray.bench.device.shapes import (
    DECODERS,
    KERNELS,
    SPREAD,
    TRUTH,
    Variant,
    load_decoding,
    load_encoder,
    load_reranker,
    make_decoder,
    make_model,
    random_rows,
)
from bge_ray.errors import ModelError
from bge_ray.model.run.batching import token_budget_batches
from bge_ray.model.run.executor import Executor
from bge_ray.model.run.model import Model
from bge_ray.model.run.result import Result
from bge_ray.pipeline.engine.device import EXIT_CODE
from bge_ray.records.outputs import Output
from bge_ray.records.tokens import PackedTokens

LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512)
LONG = (4_097, 8_192)
# 1 - cosine to float32: float16's own rounding, bfloat16's; and float32's own on another device.
MOST = {"float16": 1e-4, "bfloat16": 2e-3, "float32": 1e-5}
# Of components of unit vectors of one dtype, computed in batches of another make.
MOST_MOVED = 4e-3
BUDGET = 4_096

# What a check comes to: its worst figure, and the most that it may be.
Figure: TypeAlias = tuple[float, float]
Check: TypeAlias = Callable[[], Figure]


def run(plan: Plan, note: Note) -> None:
    """Note every check; ``failed`` names those that did not hold."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    found: dict[str, dict[str, Any]] = {}
    for name, check in _checks(plan):
        if plan.left < 0:
            found[name] = {"left_out": "no time was left"}
        else:
            found[name] = _outcome(check)
        note("checks", found)
    note("failed", sorted(name for name, outcome in found.items() if not outcome.get("holds", False)))


def _outcome(check: Check) -> dict[str, Any]:
    try:
        worst, most = check()
    except Exception as error:  # noqa: BLE001 - one check that breaks down must not hide the others
        return {"holds": False, "error": f"{error!r}"[:600], "where": traceback.format_exc()[-1500:]}
    return {"holds": bool(worst <= most), "worst": worst, "most": most}


def _checks(plan: Plan) -> Iterator[tuple[str, Check]]:
    half = [(dtype, kernels) for dtype in ("float16", "bfloat16") for kernels in KERNELS]
    variants = half if plan.on_gpu else [("float32", "plain"), ("float32", "fused"), ("bfloat16", "plain")]
    for shape in TRUTH if plan.on_gpu else ("head 32",):
        for pooling in ("cls", "mean", "last_token"):
            for dtype, kernels in variants:
                variant = Variant(dtype, kernels, pooling)
                yield (
                    f"{shape}, {pooling}, {dtype}, {kernels}",
                    partial(_against_padded, plan, shape, variant),
                )
    for kind in DECODERS:
        for dtype in ("float16", "bfloat16") if plan.on_gpu else ("float32",):
            yield f"{kind}, last_token, {dtype}", partial(_decoder, plan, kind, dtype)
    for dtype in ("float16", "bfloat16") if plan.on_gpu else ("float32",):
        yield f"reranker, {dtype}", partial(_reranker, plan, dtype)
    yield "device float32 against CPU float32", partial(_against_cpu, plan)
    for kernels in KERNELS:
        yield f"other rows do not move, {kernels}", partial(_leak, plan, kernels)
        yield f"order of rows, {kernels}", partial(_permuted, plan, kernels)
        yield f"batches of one row, {kernels}", partial(_one_by_one, plan, kernels)
        yield f"rows beyond the budget, {kernels}", partial(_small_budget, plan, kernels)
    yield "infinite weight", partial(_infinite, plan)
    if plan.on_gpu:
        for kernels in KERNELS:
            yield f"one batch of 131,072 tokens, {kernels}", partial(_large_budget, plan, kernels)
            yield f"no hidden wait, {kernels}", partial(_no_wait, plan, kernels)
        yield "no hidden wait, padded", partial(_no_wait, plan, "plain", packed=False)
        yield "halving when memory is short", partial(_short_of_memory, plan)
        yield "a device-side assert ends the process", partial(_device_assert, plan)


def _folder(plan: Plan, shape: str, kind: str = "encoder") -> Path:
    name = f"truth-{shape.replace(' ', '-')}-{kind}"
    return make_model(TRUTH[shape], Path(plan.work) / name, spread=SPREAD, reranker=kind == "reranker")


def _model(plan: Plan, shape: str, variant: Variant) -> Model:
    return load_encoder(_folder(plan, shape), variant, plan.device, TRUTH[shape].positions)


def _rows(shape: str, lengths: tuple[int, ...] = LENGTHS) -> PackedTokens:
    return random_rows(np.asarray(lengths * 3, np.int64), TRUTH[shape].vocabulary)


def _outputs(model: Model, rows: PackedTokens, budget: int = BUDGET) -> np.ndarray:
    """Return (n, dim) vectors, or (n,) scores; refuses rows that have none."""
    result = model.empty_result(len(rows))
    model.run(rows, model.cut(rows, budget), result)
    if result.faults:
        raise ModelError(
            f"{len(result.faults)} rows have no output, such as {next(iter(result.faults.items()))}"
        )
    return result.array(model.spec.outputs[0].name).astype(np.float64)


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest 1 - cosine of (n, dim) vectors."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return float((1 - (found * wanted).sum(axis=1) / norms).max())


def _against_padded(plan: Plan, shape: str, variant: Variant) -> Figure:
    rows = _rows(shape, LENGTHS + LONG if TRUTH[shape].positions > 512 and plan.on_gpu else LENGTHS)
    exact = _outputs(_model(plan, shape, Variant("float32", pooling=variant.pooling, packed=False)), rows)
    return _distance(_outputs(_model(plan, shape, variant), rows), exact), MOST[variant.dtype]


def _decoder(plan: Plan, kind: str, dtype: str) -> Figure:
    """A decoder packed against padded, the last token of each row."""
    folder, rows = make_decoder(kind, Path(plan.work) / f"truth-{kind}"), _rows("head 32")
    found = []
    for executor in (
        load_decoding(folder, dtype, plan.device, packed=True),
        load_decoding(folder, "float32", plan.device, packed=False),
    ):
        result = Result((Output("embedding", "dense", 512, "float32"),), len(rows))
        batches = token_budget_batches(rows.lengths, BUDGET, packed=executor.packed)
        executor.run(rows, batches, result)
        if result.faults:
            raise ModelError(f"rows have no output: {result.faults}")
        found.append(result.array("embedding").astype(np.float64))
    return _distance(found[0], found[1]), MOST[dtype]


def _reranker(plan: Plan, dtype: str) -> Figure:
    shape = "xlm-r" if plan.on_gpu else "head 32"
    folder, rows = _folder(plan, "xlm-r", "reranker"), _rows("xlm-r", LENGTHS)
    if not plan.on_gpu:
        rows = _rows("xlm-r", LENGTHS[:8])
    length = TRUTH[shape].positions
    exact, half = (
        _outputs(load_reranker(folder, variant, plan.device, length), rows)
        for variant in (Variant("float32", packed=False), Variant(dtype))
    )
    # Logits of a random model are as large as their spread.
    return float(np.abs(half - exact).max() / exact.std()), {
        "float16": 0.03,
        "bfloat16": 0.25,
        "float32": 1e-3,
    }[dtype]


def _against_cpu(plan: Plan) -> Figure:
    rows = _rows("head 64", LENGTHS[:9])
    exact = Variant("float32", packed=False)
    there = _outputs(_model(plan, "head 64", exact), rows)
    here = load_encoder(_folder(plan, "head 64"), exact, "cpu", 512)
    return _distance(there, _outputs(here, rows)), MOST["float32"]


def _moved(found: np.ndarray, wanted: np.ndarray) -> Figure:
    return float(np.abs(found - wanted).max()), MOST_MOVED


def _leak(plan: Plan, kernels: str) -> Figure:
    """Change one row: the others must stay."""
    model, rows = _model(plan, "head 64", Variant(plan.half, kernels, "mean")), _rows("head 64")
    before = _outputs(model, rows)
    changed = 20
    ids = rows.input_ids.copy()
    span = slice(rows.offsets[changed], rows.offsets[changed + 1])
    ids[span] = ids[span][::-1] // 2 + 10
    after = _outputs(model, PackedTokens(ids, rows.offsets, rows.truncated))
    if _distance(after[[changed]], before[[changed]]) < 1e-3:
        raise ModelError("the changed row has the same vector: this check sees nothing")
    others = np.arange(len(rows)) != changed
    return _moved(after[others], before[others])


def _permuted(plan: Plan, kernels: str) -> Figure:
    model, rows = _model(plan, "head 64", Variant(plan.half, kernels, "mean")), _rows("head 64")
    order = np.random.default_rng(3).permutation(len(rows))
    parts = [rows.input_ids[rows.offsets[i] : rows.offsets[i + 1]].tolist() for i in order]
    mixed = PackedTokens.of(parts, rows.truncated[order])
    return _moved(_outputs(model, mixed), _outputs(model, rows)[order])


def _one_by_one(plan: Plan, kernels: str) -> Figure:
    model, rows = _model(plan, "head 64", Variant(plan.half, kernels)), _rows("head 64")
    result = model.empty_result(len(rows))
    model.run(rows, [np.asarray([row], np.int64) for row in range(len(rows))], result)
    return _moved(result.array("embedding").astype(np.float64), _outputs(model, rows))


def _small_budget(plan: Plan, kernels: str) -> Figure:
    model, rows = _model(plan, "head 64", Variant(plan.half, kernels)), _rows("head 64")
    return _moved(_outputs(model, rows, 200), _outputs(model, rows))


def _large_budget(plan: Plan, kernels: str) -> Figure:
    model = _model(plan, "head 64", Variant(plan.half, kernels))
    rows = random_rows(np.full(256, 512, np.int64), TRUTH["head 64"].vocabulary)
    return _moved(_outputs(model, rows, 131_072), _outputs(model, rows, 8_192))


def _infinite(plan: Plan) -> Figure:
    """A weight that is infinite: no row may come out as if it were right."""
    folder = Path(plan.work) / "truth-infinite"
    if not (folder / "config.json").is_file():
        from transformers import BertModel

        broken = BertModel.from_pretrained(_folder(plan, "head 32"))
        with torch.no_grad():
            broken.encoder.layer[0].attention.output.dense.weight[0, 0] = float("inf")
        broken.save_pretrained(folder)
    model, rows = load_encoder(folder, Variant(plan.half), plan.device, 512), _rows("head 32", LENGTHS[:6])
    result = model.empty_result(len(rows))
    try:
        model.run(rows, model.cut(rows, BUDGET), result)
    except ModelError:
        return 0.0, 0.0
    return float(len(rows) - len(result.faults)), 0.0


def _no_wait(plan: Plan, kernels: str, *, packed: bool | None = None) -> Figure:
    """No launch waits for the device; what waits for a batch that is ready is no launch."""
    for pooling in ("cls", "mean", "last_token"):
        model, rows = _model(plan, "head 64", Variant(plan.half, kernels, pooling, packed)), _rows("head 64")
        _outputs(model, rows)  # kernels are loaded, memory is claimed
        launch = Executor._launch  # the one place where a launch begins and ends

        def watched(*given: Any, _launch: Any = launch, **named: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return _launch(*given, **named)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        Executor._launch = watched  # type: ignore[method-assign]
        try:
            _outputs(model, rows)
        finally:
            Executor._launch = launch  # type: ignore[method-assign]
    return 0.0, 0.0


def _short_of_memory(plan: Plan) -> Figure:
    """With little memory a large batch is halved until it fits, and vectors stay."""
    model = _model(plan, "head 64", Variant(plan.half))
    rows = random_rows(np.full(1_024, 512, np.int64), TRUTH["head 64"].vocabulary)
    wanted = _outputs(model, rows, 16_384)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (1 << 30)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        result = model.empty_result(len(rows))
        model.run(rows, model.cut(rows, 1 << 20), result)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    if not result.splits:
        raise ModelError("nothing was halved: this check sees nothing")
    return _moved(result.array("embedding").astype(np.float64), wanted)


_ASSERT = """
import sys
import numpy as np
from pathlib import Path
from bge_ray.bench.device.shapes import Variant, load_encoder
from bge_ray.pipeline.engine.device import device_or_exit
from bge_ray.records.outputs import Output
from bge_ray.records.tokens import PackedTokens
model = load_encoder(Path(sys.argv[1]), Variant("float16"), "cuda", 512)
rows = PackedTokens(np.full(8, 10**6, np.int32), np.asarray([0, 8], np.int32), np.zeros(1, np.bool_))
with device_or_exit("a row with a token that there is none of"):
    model.run(rows, model.cut(rows, 64), model.empty_result(1))
"""


def _device_assert(plan: Plan) -> Figure:
    """A kernel that fails in its process ends that process with the code of a lost device."""
    command = [sys.executable, "-c", _ASSERT, str(_folder(plan, "head 64"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    if done.returncode != EXIT_CODE:
        raise ModelError(f"ended with {done.returncode}, not {EXIT_CODE}: {done.stderr[-800:]}")
    return 0.0, 0.0
