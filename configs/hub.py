"""What names something on a model hub."""

import re

_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def is_hub_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None
