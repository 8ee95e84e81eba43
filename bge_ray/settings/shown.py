"""The settled settings as YAML, which is a config file again."""

from typing import Any

import yaml

from bge_ray.settings.sections import Settings, known_keys

# What these are if nobody sets them is not their default: a search takes the model of the data set.
OPEN = ("model.name",)


def to_yaml(settings: Settings) -> str:
    """Return every setting with its value; those in OPEN that nobody set as a comment."""
    set_keys = {
        f"{section}.{name}"
        for section in settings.model_fields_set
        for name in getattr(settings, section).model_fields_set
    }
    values = settings.model_dump(mode="json")
    lines: list[str] = []
    for key, *_ in known_keys():
        section, _, name = key.partition(".")
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        comment = "# " if key in OPEN and key not in set_keys else ""
        lines.append(f"  {comment}{name}: {_scalar(values[section][name])}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """Return a value on one line, with `${` as `expand` takes it for itself."""
    text = yaml.safe_dump(_escaped(value), default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _escaped(value: Any) -> Any:
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
