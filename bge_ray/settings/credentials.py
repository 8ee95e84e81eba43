"""Credentials have no place in settings, which end up in logs, plans and reports."""

import re

from bge_ray.errors import SettingsError

# A name and a password in front of a bucket or host (digits after the colon are a port), or a signed URL.
_CREDENTIALS = re.compile(
    r"://[^/\s@:]+:(?!\d+/)[^@\s]*@|[?&](sig|signature|x-amz-\w*-?(signature|credential|token)|awsaccesskeyid)=",
    re.IGNORECASE,
)


def refuse_credentials(text: str, place: str) -> None:
    """Refuse a text with a URI that holds credentials; they would end up in logs, plans and reports.

    Raises:
        SettingsError: it does; the message names the place and does not repeat them.
    """
    if _CREDENTIALS.search(text) is not None:
        place = "the command line" if _CREDENTIALS.search(place) else place
        raise SettingsError(
            f"{place}: holds a URI with credentials; take them out, and give them in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...) or by the machine's role"
        )
