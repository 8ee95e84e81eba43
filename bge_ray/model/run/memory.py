"""Which errors mean that memory is short, and which that the device is lost."""

import torch

# The CPU allocator, oneDNN, cuBLAS and the CUDA driver have no exception type of their own for this.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a real lack of memory from every other RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def is_broken_device(error: BaseException) -> bool:
    """Tell a failed CUDA context (device-side assert, lost device), which only a new process mends."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
