"""`${NAME}` in a setting: a variable of the environment of the job, such as the bucket of this stage."""

import os
import re
from typing import Any

from bge_ray.errors import SettingsError
from bge_ray.settings.credentials import refuse_credentials

# `$${` stands for the characters `${`.
_VARIABLE = re.compile(r"\$(\$\{|\{([^}]*)\})")
_SECRET = re.compile(
    r"SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|ACCESS_KEY|API_?KEY|PRIVATE_KEY", re.IGNORECASE
)


def expand(value: Any, key: str) -> Any:
    """Return a setting with its variables filled in, in texts and in lists of texts.

    Args:
        value: of the setting, as it was given.
        key: of the setting, for messages.

    Raises:
        SettingsError: a variable is not set, has no name, or its name says that it is secret, or the text
            holds credentials once it is filled in.
    """
    if isinstance(value, list | tuple):
        return [expand(item, key) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    filled = _VARIABLE.sub(lambda found: _value(found, key), value)
    refuse_credentials(filled, key)
    return filled


def _value(found: re.Match[str], key: str) -> str:
    name = found[2]
    if name is None:
        return "${"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise SettingsError(f"{key}: ${{{name}}} is no variable; write $${{ for the characters themselves")
    if _SECRET.search(name):
        raise SettingsError(
            f"{key}: ${{{name}}} is a secret by its name, and settings are written into reports; credentials "
            "are taken from the environment by themselves"
        )
    if name not in os.environ:
        raise SettingsError(f"{key}: the environment has no variable {name}; set it, or write $${{ for ${{")
    return os.environ[name]
