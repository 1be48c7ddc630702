"""The one error that a user meets: a sentence that says what was found, where, and what to do.

Every command ends in command(): a UserError becomes that sentence on stderr and exit code 2, without a
traceback, and so does what a disk refuses at whichever file; anything else is our own bug and keeps its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable

REFUSED_BY_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENAMETOOLONG,
}


class UserError(Exception):
    """Something in the user's flags, files or machine; the message is the whole explanation."""


def printable(text: str) -> str:
    """The text on one line, in characters that cannot move a terminal's cursor or change its colours."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def command(main: Callable[[], int | None]) -> None:
    """Run main() as a command: exit with its code (None is 0), or with 2 and one sentence for a UserError or a disk."""
    # before torch is imported: threads that wait sleep, for spinning beside another busy program costs four times the time
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        sys.exit(main() or 0)
    except UserError as error:
        sentence = str(error)
    except BrokenPipeError:  # whoever read the output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor can what is left be written at exit
        sys.exit(141)  # what shells say of a program that SIGPIPE ended
    except OSError as error:
        if error.errno not in REFUSED_BY_DISK:
            raise
        path = error.filename2 or error.filename or "writing a file"  # of a copy the second is what is written
        sentence = f"{path}: {error.strerror}; make room or give the right to it, or name another"
    print(f"error: {printable(sentence)}", file=sys.stderr)
    sys.exit(2)
