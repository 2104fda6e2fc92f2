"""What a user did wrong: one clear line and exit status 2."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake outside the code: name, value, what is allowed, what to do."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command; a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"duet: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
