"""The one error that a user meets: a sentence that says what was found, where, and what to do.

Every command ends in command(): a UserError becomes that sentence on stderr and exit code 2, without a
traceback; anything else is our own bug and keeps its traceback.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something in the user's flags, files or machine; the message is the whole explanation."""


def command(main: Callable[[], int | None]) -> None:
    """Run main() as a command: exit with its code (None is 0), or with 2 and one sentence for a UserError."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
