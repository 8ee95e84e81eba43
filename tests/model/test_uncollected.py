"""The garbage collector is as it was, once something has been loaded without it."""

import gc

import pytest

from bge_ray.model.uncollected import uncollected


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_it_was_also_when_loading_fails(*, on: bool) -> None:
    seen = []

    @uncollected()
    def load() -> None:
        seen.append(gc.isenabled())
        raise ZeroDivisionError

    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                load()
        assert (seen, gc.isenabled()) == ([False, False], on)
    finally:
        (gc.enable if before else gc.disable)()
