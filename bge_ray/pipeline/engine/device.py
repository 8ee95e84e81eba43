"""What an actor does whose device is lost."""

import contextlib
import logging
import os
from collections.abc import Iterator

logger = logging.getLogger(__name__)

EXIT_CODE = 75


@contextlib.contextmanager
def device_or_exit(at_work_on: str) -> Iterator[None]:
    """End this process if the device fails: a CUDA context stays broken, and a new process gets a new one."""
    try:
        yield
    except RuntimeError as error:
        from bge_ray.model.run.memory import is_broken_device  # torch, only where there is a device

        if not is_broken_device(error):
            raise
        logger.exception("%s: the device failed; restarting this actor", at_work_on)
        os._exit(EXIT_CODE)
