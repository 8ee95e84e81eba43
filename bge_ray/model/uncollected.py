"""Loading without the garbage collector."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Let modules and weights be loaded without a search for garbage among them; works as a decorator, too.

    Importing torch and transformers makes 400,000 objects that stay, and the collector goes through them over
    and over. In a process of several threads none of them collects meanwhile.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
