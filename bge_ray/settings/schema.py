"""The settings as a JSON schema, by which an editor completes and checks a config file."""

from typing import Any

from bge_ray.settings.sections import Settings

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def settings_schema() -> dict[str, Any]:
    """Return the schema of a config file: it takes what `parse_settings` takes, but for variables.

    A section may be empty, and one value stands for a list of one, as in `parse_settings`.
    """
    schema = Settings.model_json_schema()
    for section in schema["$defs"].values():
        for name, key in section["properties"].items():
            section["properties"][name] = _or_one(key)
    for name, section in schema["properties"].items():
        reference = {"$ref": section["$ref"]}
        schema["properties"][name] = {
            "anyOf": [reference, {"type": "null"}],
            "description": schema["$defs"][section["$ref"].rpartition("/")[2]]["description"],
        }
    schema |= {"$schema": DIALECT, "title": "bge-ray settings", "type": ["object", "null"]}
    return schema


def _or_one(key: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a setting that takes one value for a list of it, too."""
    kinds = key.get("anyOf", [key])
    lists = [kind for kind in kinds if kind.get("type") == "array" and "items" in kind]
    if not lists:
        return key
    outer = {name: what for name, what in key.items() if name in ("description", "default", "title")}
    inner = [{n: what for n, what in kind.items() if n not in outer} for kind in kinds]
    return {**outer, "anyOf": [*inner, *(kind["items"] for kind in lists)]}
