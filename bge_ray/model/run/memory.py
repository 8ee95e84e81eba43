"""Whether a model fits a device; which errors mean a lack of memory, and which the loss of the device."""

import os
import re
from pathlib import Path

import psutil
import torch

from bge_ray.errors import ModelError
from bge_ray.model.run.batching import Card
from bge_ray.model.weights import weights_bytes
from bge_ray.records.model import ModelSpec, RerankerSpec

# What a container may use at most, where there is one: of cgroups of version 2, and of version 1.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

DRIVER = Path("/proc/driver/nvidia/version")

# The CPU allocator, oneDNN, cuBLAS and the CUDA driver have no exception type of their own for this.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory",
)


def check_device(device: torch.device) -> None:
    """Refuse a GPU that Ray counts and torch does not see, before anything is loaded.

    Raises:
        ModelError: names the driver and what torch was built for.
    """
    if device.type != "cuda" or torch.cuda.is_available():
        return
    built = f"torch {torch.__version__} is built for " + (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    )
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    raise ModelError(
        f"this process was given a GPU (CUDA_VISIBLE_DEVICES {given}) and torch sees none: {built}, and the "
        f"driver here is {_driver_version() or 'not installed'}. Install a driver that is new enough (580 or "
        "later for CUDA 13) or a torch built for an older CUDA, or set gpus_per_encoder or gpus_per_reranker "
        "to 0"
    )


def _driver_version() -> str | None:
    """Return the version of the NVIDIA driver's kernel module, which torch cannot tell if it is too old."""
    if not DRIVER.is_file():
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", DRIVER.read_text())
    return found[0] if found else "unknown"


def card_of(device: torch.device) -> Card | None:
    """Return what of a GPU decides how large its batches are; None of a CPU."""
    if device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    return Card(int(facts.L2_cache_size), int(facts.multi_processor_count))


def memory_of(device: torch.device) -> int:
    """Return the bytes of a device's memory, of a CPU's node as far as this process may use it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [
        int(text) for path in _LIMITS if path.is_file() and (text := path.read_text().strip()).isdigit()
    ]
    return min([int(psutil.virtual_memory().total), *limits])


def check_room(spec: ModelSpec, folder: Path, device: torch.device) -> None:
    """Refuse a model whose weights alone are larger than a device, before any of them is read.

    Layers above the last that scores are not loaded, and do not count.

    Raises:
        ModelError: names both sizes, and what would help.
    """
    scoring = spec.layers if isinstance(spec, RerankerSpec) else ()
    needed = weights_bytes(folder, spec.dtype, scoring[-1] if scoring else None)
    there = memory_of(device)
    if needed <= there:
        return
    ways = ["a smaller model", f"{'a GPU' if device.type == 'cuda' else 'nodes'} with more memory"]
    if spec.dtype == "float32":
        ways.insert(0, "bfloat16, which takes half (model.dtype, or rerank.dtype of a reranker)")
    if scoring:
        ways.insert(0, "an earlier last layer (rerank.cutoff_layers)")
    raise ModelError(
        f"{spec.name}: its weights take {needed / 1e9:,.1f} GB in {spec.dtype}, and {device} has "
        f"{there / 1e9:,.1f} GB. What would help: {'; '.join(ways)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a real lack of memory from every other RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def is_broken_device(error: BaseException) -> bool:
    """Tell a failed CUDA context (device-side assert, lost device), which only a new process mends."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
