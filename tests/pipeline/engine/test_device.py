"""An actor whose device is lost ends; every other error is its owner's."""

import subprocess
import sys

import pytest

from bge_ray.pipeline.engine.device import EXIT_CODE, device_or_exit

LOST = """
import torch
from bge_ray.pipeline.engine.device import device_or_exit
with device_or_exit("unit 3-0"):
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")
"""


@pytest.mark.long
def test_a_lost_device_ends_the_process_and_says_at_what_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_CODE
    assert "unit 3-0: the device failed" in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("no number")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), device_or_exit("unit 3-0"):
        raise error
