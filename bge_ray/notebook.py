"""A job as a part of someone's program: what it finds there is as it was afterwards."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from bge_ray.errors import SettingsError
from bge_ray.records.reports import EmbedReport
from bge_ray.settings.sections import ResourcesSettings, Settings, parse_tree


def embed(settings: Settings | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> EmbedReport:
    """Embed a corpus; see `bge_ray.embed`."""
    asked = _settled(settings, overrides)
    with _as_a_guest(asked.resources):
        from bge_ray.pipeline.embed.job import embed as run

        return run(asked).report


def _settled(settings: Settings | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> Settings:
    single: dict[str, dict[str, Any]] = {}
    for name, value in overrides.items():
        section, separator, key = name.partition("__")
        if not separator:
            raise SettingsError(f"{name}: expected section__key, such as corpus__uri")
        single.setdefault(section, {})[key] = _plain(value)
    if isinstance(settings, Settings):
        if not single:
            return settings
        # What was parsed has its variables filled in, and is not read a second time.
        tree, given = (
            settings.model_dump(exclude_unset=True),
            parse_tree(single).model_dump(exclude_unset=True),
        )
        for section, keys in given.items():
            tree[section] = {**tree.get(section, {}), **keys}
        return Settings.model_validate(tree)
    tree = {name: {k: _plain(v) for k, v in (keys or {}).items()} for name, keys in (settings or {}).items()}
    for section, keys in single.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return parse_tree(tree)


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextlib.contextmanager
def _as_a_guest(resources: ResourcesSettings) -> Iterator[None]:
    """Run with Ray, and leave process and Ray as they were found."""
    from bge_ray.pipeline.engine.cluster import (
        disconnect,
        is_connected,
        prepare_environment,
        quiet_ray,
        restore_environment,
    )
    from bge_ray.pipeline.engine.liveness import unwatch_cluster

    was_there = is_connected()
    environment = dict(os.environ)
    went_well = False
    try:
        prepare_environment(resources)
        with quiet_ray():
            yield
        went_well = True
    finally:
        unwatch_cluster()
        if not was_there:
            disconnect(keep_logs=not went_well)
            restore_environment(environment)
