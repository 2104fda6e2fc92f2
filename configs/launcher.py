"""What a launcher of several processes told this one, before torch is loaded."""

import os


def is_first_here() -> bool:
    """The first of its machine's processes: whose progress bars are shown."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")
