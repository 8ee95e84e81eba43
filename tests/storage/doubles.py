"""Storages whose process dies, or whose world changes, between two requests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bge_ray.storage.objects import Storage


class Died(BaseException):
    """The process is gone; nothing of ours catches this."""


@dataclass(frozen=True)
class Hooked(Storage):
    """Calls ``before`` with the number of each request, from 0, before it is made."""

    before: Callable[[int], None] = lambda _: None
    counted: list[str] = field(default_factory=list)

    def attempt(self, verb: str, uri: str, operation: Callable[[Any, str], Any]) -> Any:
        number = len(self.counted)
        self.counted.append(f"{verb} {uri}")
        self.before(number)
        return super().attempt(verb, uri, operation)


def dying(at: int, timeout_s: float = 20.0) -> Hooked:
    """Return a storage whose process dies before its request of that number."""

    def die(number: int) -> None:
        if number >= at:
            raise Died

    return Hooked(timeout_s, die)


def once(at: int, act: Callable[[], None], timeout_s: float = 20.0) -> Hooked:
    """Return a storage before whose request of that number something else happens."""

    def before(number: int) -> None:
        if number == at:
            act()

    return Hooked(timeout_s, before)
