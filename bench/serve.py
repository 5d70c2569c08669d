"""How a command of this package ends: with what it made, or with one line that says why not."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fastpeft.errors import FastPEFTError

# What an interruption leaves behind.
GOES_ON = "the same command goes on from here"
NOTHING = "nothing was written"


def serve(request: Callable[[], object], interrupted: str = NOTHING) -> int:
    """Serve a request: 0, 2 for one that cannot be served, or 130 for one that was interrupted.

    Args:
        request: does it all.
        interrupted: what its interruption leaves behind, in words.
    """
    try:
        request()
    except FastPEFTError as error:
        return _ended(error, 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _ended(f"{where}{error.strerror or error}", 2)
    except KeyboardInterrupt:
        return _ended(f"interrupted; {interrupted}", 130)
    return 0


def _ended(why: object, status: int) -> int:
    print(f"error: {' '.join(str(why).split())}", file=sys.stderr, flush=True)
    return status
