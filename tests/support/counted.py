"""A store that notes what is read of it."""

from collections import Counter

from bge_ray.storage.objects import Storage


class CountedStorage(Storage):
    """Notes every range that is read."""

    def __init__(self) -> None:
        super().__init__(20.0)
        self.bytes: Counter[str] = Counter()
        self.ranges: Counter[tuple[str, int, int]] = Counter()

    def read(self, uri: str) -> bytes:
        data = super().read(uri)
        self.bytes[uri] += len(data)
        return data

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        self.ranges[uri, start, stop] += 1
        self.bytes[uri] += stop - start
        return super().read_range(uri, start, stop)
