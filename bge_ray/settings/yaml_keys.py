"""YAML in which a key stands once: PyYAML takes the last of several, and what the others said is gone."""

from typing import Any

import yaml


class _EachKeyOnce(yaml.SafeLoader):
    """Reads what the safe loader reads."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping as it is written; what it merges in by `<<` it may say anew.

        Raises:
            ComposerError: a key stands twice; names it and both lines.
        """
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in first:
                    said = f"{key.value} stands twice, first in line {first[key.value]}"
                    raise yaml.composer.ComposerError(None, None, said, key.start_mark)
                first[key.value] = key.start_mark.line + 1
        return node


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        YAMLError: it is not YAML, asks for objects, or has a key twice in one place.
    """
    return yaml.load(text, _EachKeyOnce)  # noqa: S506 - a safe loader
